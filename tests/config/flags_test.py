"""Flags of commands."""

from absl import flags
from ml_collections import ConfigDict

from vjepa_jax.config.flags import expand_home


def test_home_is_found_where_shells_leave_the_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/her")
    config = ConfigDict({"data": {"path": "~/a,~/b,c/~/d"}, "seed": 1})
    config.overrides = "num_videos=2 data.test_path=~/v"
    config.tfds = "tfds:films:train@~/tfds"
    config.kept = "~other/a b~ ~x"
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "~/run", "", flag_values=values)
    flags.DEFINE_integer("steps", 3, "", flag_values=values)
    flags.DEFINE_string("config", None, "", flag_values=values)
    values["config"].value = config.lock()
    values.mark_as_parsed()
    expand_home(values)
    assert (values.workdir, values.steps) == ("/home/her/run", 3)
    assert config.to_dict() == {
        "data": {"path": "/home/her/a,/home/her/b,c/~/d"},
        "seed": 1,
        "overrides": "num_videos=2 data.test_path=/home/her/v",
        "tfds": "tfds:films:train@/home/her/tfds",
        "kept": "~other/a b~ ~x",
    }
