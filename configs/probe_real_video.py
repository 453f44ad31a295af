r"""Camera footage: what frozen features know of a scene, of motion, of driving.

Tasks on the robot arms of DROID, with lists that `benchmarks/real_video.py` makes (no
laboratory is in both of a task's lists), and on the drives of a model car. Each has
the same read-outs for the encoder, for one frame repeated, for an untrained encoder,
and for pixels. See docs/real_video.md.

Command:

    python -m vjepa_jax.probe --config=configs/probe_real_video.py --workdir=DIR
"""

from vjepa_jax.evals import settings

# Name: the list's name, and how its clips are cut.
_TASKS = {
    # What shows in a single frame.
    "scene": {"lists": "droid/scene", "fps": 5.0},
    # What a robot does: the clips of most videos span all of it.
    "verb": {"lists": "droid/verb", "fps": 5.0},
    "open_or_close": {"lists": "droid/open_or_close", "fps": 5.0},
    "put_or_remove": {"lists": "droid/put_or_remove", "fps": 5.0},
    # Only the order of the frames tells the classes apart.
    "arrow": {"lists": "droid/all", "fps": 8.0, "change": "arrow"},
    "halves": {"lists": "droid/all", "fps": 8.0, "change": "halves"},
    # What a driver did, with every frame.
    "drive_by_time": {"lists": "donkey/time", "frame_step": 2, "sensors": True},
    "drive_by_track": {"lists": "donkey/track", "frame_step": 2, "sensors": True},
}


def get_config(folder: str = "runs/real_video"):
    """Return the config.

    Args:
      folder: of the lists.
    """
    config = settings.real_video()
    for name, fields in _TASKS.items():
        lists = f"{folder}/{fields['lists']}"
        config.tasks[name] = settings.task(
            train_path=f"{lists}/train.csv",
            test_path=f"{lists}/test.csv",
            fps=fields.get("fps", 0.0),
            frame_step=fields.get("frame_step", 0),
            change=fields.get("change", ""),
            sensors=("steering", "throttle") if "sensors" in fields else (),
        )
    return config.lock()
