"""Probes of official files become ours and go back."""

import json

import jax
import numpy as np
import pytest
from official_files import Golden

import vjepa_jax
from vjepa_jax import convert
from vjepa_jax.base.errors import UserError
from vjepa_jax.models.heads import AttentiveClassifier
from vjepa_jax.run import checkpoint
from vjepa_jax.weights import files, official, rules


def test_probe_has_no_encoder(tmp_path):
    golden = Golden("vjepa2_probe")
    convert.save(golden.converted(), str(tmp_path / "probe"))
    with pytest.raises(UserError, match="holds a probe, not an encoder"):
        vjepa_jax.load_encoder(str(tmp_path / "probe"))
    models, meta = checkpoint.restore_models(str(tmp_path / "probe"))
    model = AttentiveClassifier(**meta["classifier"])
    params = {"params": models["target"]["0"]}
    logits = jax.jit(model.apply)(params, golden.arrays["x"])
    np.testing.assert_allclose(logits, golden.arrays["y"], atol=1e-4)


def test_exported_probe_is_read_as_the_same_family(tmp_path):
    """V-JEPA's probe is told from V-JEPA 2's by a layer that nothing uses."""
    pytest.importorskip("torch")
    convert.save(Golden("vjepa1_probe").converted(), str(tmp_path / "probe"))
    file = str(tmp_path / "probe.pt")
    convert.export_official(str(tmp_path / "probe"), file)
    again = convert.convert(file, str(tmp_path / "again"), official.Hints(num_heads=4))
    assert again.meta["classifier"]["blocks_on_query"]


@pytest.mark.parametrize("names", [("verb", "noun", "action"), ("action",)])
def test_probe_of_action_anticipation(rng, names):
    """Its queries do not see each other: as many probes of one query, in one."""
    golden = Golden("vjepa2_probe")
    content = golden.content["classifier"]
    (prefix,) = {name.partition("pooler.")[0] for name in content if "pooler" in name}
    width = golden.meta["embed_dim"]
    queries = rng.normal(size=(1, len(names), width)).astype(np.float32)
    state = {name: value for name, value in content.items() if "linear" not in name}
    state[f"{prefix}pooler.query_tokens"] = queries
    singles = []
    for i, name in enumerate(names):
        weight = rng.normal(size=(5 + i, width)).astype(np.float32)
        bias = rng.normal(size=5 + i).astype(np.float32)
        state[f"{prefix}{name}_classifier.weight"] = weight
        state[f"{prefix}{name}_classifier.bias"] = bias
        single = {
            f"{prefix}pooler.query_tokens": queries[:, i : i + 1],
            f"{prefix}linear.weight": weight,
            f"{prefix}linear.bias": bias,
        }
        kept = {n: v for n, v in content.items() if "linear" not in n}
        singles.append({"classifiers": [kept | single]})
    hints = official.Hints(num_heads=golden.meta["num_heads"])

    def run(content):
        source = files.split(content, "golden")
        converted = convert.import_source(source, hints)
        fields = json.loads(json.dumps(converted.meta["classifier"]))  # as stored
        model = AttentiveClassifier(**fields)
        params = {"params": converted.target["0"]}
        return converted, jax.jit(model.apply)(params, golden.arrays["x"])

    converted, logits = run({"classifiers": [state]})
    assert set(logits) == set(names)
    for name, single in zip(names, singles, strict=True):
        np.testing.assert_allclose(logits[name], run(single)[1], atol=1e-5)
    parts = convert.export_parts({"target": converted.target}, converted.meta)
    (exported,) = parts["classifiers"]
    wanted = rules.strip_prefixes(state)
    assert set(exported) == set(wanted)
    for name, value in exported.items():
        assert value.tobytes() == wanted[name].tobytes(), name
