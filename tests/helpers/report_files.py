"""Workdirs for reports, made without training."""

import json
import math

import jax
import numpy as np
import video_files

from vjepa_jax.config.defaults import get_config, mask
from vjepa_jax.objective.state import unbox
from vjepa_jax.program import build
from vjepa_jax.run import checkpoint, workdirs
from vjepa_jax.world.motion import CLASSES

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'"
SIDE, FRAMES, VIDEOS = 16, 12, 20


def write_videos(folder):
    """Write a list of videos with two classes, bright and dark; return its path."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(VIDEOS):
        frames = video_files.moving_frames(FRAMES, height=24, width=32, seed=i)
        frames = (frames * (0.4 if i % 2 else 1.0)).astype(np.uint8)
        video_files.write_video(folder / f"{i}.mp4", frames)
        lines.append(f"{i}.mp4 {i % 2}\n")
    (folder / "list.csv").write_text("".join(lines))
    return folder / "list.csv"


def make_config(data_path, is_world):
    """Return the config of a run of a very small model."""
    config = get_config()
    with config.unlocked():
        del config.masks.short, config.masks.long
        config.masks[f"half {HOSTILE}"] = mask(num_blocks=0, max_temporal_keep=0.5)
    config.total_steps, config.batch_size = 100, 8
    config.data.path = str(data_path)
    config.data.num_workers = 0
    config.data.num_frames, config.data.frame_step = FRAMES, 1
    config.data.resolution = SIDE
    config.world.path = "world" * is_world
    config.world.num_frames = FRAMES
    config.model.pos_embed, config.model.dtype = "rope", "float32"
    config.model.scan_layers = False
    config.model.encoder.size, config.model.encoder.patch_size = "1x16x2x32", 8
    config.model.predictor.depth, config.model.predictor.width = 1, 16
    config.model.predictor.num_heads = 2
    return config


def write_checkpoint(workdir, config, seed=0):
    """Write the random weights of the config's models as a checkpoint."""
    encoder, predictor = build.make_models(config)
    shape = build.video_shapes(config)["video"]
    one = np.zeros((1, 1), np.int32)

    @jax.jit
    def init(key):
        clip = np.zeros((1, *shape), np.float32)
        features = np.zeros((1, 1, encoder.out_dim), np.float32)
        grid = encoder.grid(clip.shape)
        return {
            "encoder": encoder.init(key, clip)["params"],
            "predictor": predictor.init(key, features, one, one, grid)["params"],
        }

    params = unbox(init(jax.random.key(seed)))
    meta = {"config": config.to_dict(), "video_shape": shape}
    checkpoint.save_converted(str(workdir), params["encoder"], params, meta)


def write_metrics(workdir, scale=1.0):
    """Write the metrics of 50 log steps, one of them not finite, and a damaged line."""
    rows = []
    for step in range(2, 101, 2):
        loss = scale * math.exp(-step / 40)
        rows.append(
            {
                "step": step,
                "train/loss": loss,
                "train/loss_half": loss,
                "train/total_loss": loss + 0.1,
                "repr/target_effective_rank": 3 + step / 20,
                "repr/target_std": 0.5,
                "repr/context_std": 0.6,
                "optim/learning_rate": 1e-3 * step,
                "optim/grad_norm_encoder": None if step == 10 else loss,
                "perf/clips_per_second": 100.0 + step,
                "perf/wall_seconds": 2.0 * step,
                "goodput/step": 0.75,
                "goodput/data": 0.2,
                "goodput/other": 0.05,
                "eval/health/token_std": 0.5,
                "eval/health/token_std/random_init": 0.3,
            }
        )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(text + '{"step": 102, "train/lo')


def write_results(workdir):
    """Write results and confusion matrices as evaluations of the world do."""
    count = len(CLASSES)
    matrix = (np.eye(count, dtype=int) * 7 + 1).tolist()
    accuracy = 8 / (8 + count - 1)
    results = {
        "attentive_accuracy": {"pretrained": accuracy, "random_init": 0.2},
        "position_r2": {"pretrained": 0.123456, "random_init": 0.0},
        "seconds": {"probe": 1.0},
    }
    (workdir / "results.json").write_text(json.dumps(results))
    content = {"pretrained": matrix, "class_names": list(CLASSES)}
    (workdir / "confusion.json").write_text(json.dumps(content))
    physics = {"gravity": {"accuracy": 0.9, "null_accuracy": 0.5, "null_std": 0.03}}
    (workdir / "results_physics_world.json").write_text(json.dumps(physics))
    nearest = {"knn_10_accuracy": {"value": 0.5}, "videos_tested": {"value": 100}}
    (workdir / "results_neighbours.json").write_text(json.dumps(nearest))


def make_run(workdir, data_path, is_world=True, scale=1.0, seed=0):
    """Write every kind of file that the workdir of a run may hold; return it."""
    config = make_config(data_path, is_world)
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    write_checkpoint(workdir, config, seed)
    write_metrics(workdir, scale)
    workdirs.log_start(workdir, 0)
    write_results(workdir)
    bad = [
        {"path": f"/a/{HOSTILE}{i}.mp4", "reason": "empty", "step": i} for i in (1, 2)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in bad)
    (workdir / "bad_videos.jsonl").write_text(lines)
    return workdir
