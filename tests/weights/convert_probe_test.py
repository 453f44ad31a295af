"""Probes of official files are imported and exported."""

import json

import jax
import numpy as np
import pytest
from goldens import Golden

import vjepa_jax
from vjepa_jax.base.errors import UserError
from vjepa_jax.models.heads import AttentiveClassifier
from vjepa_jax.run import checkpoint, conversion
from vjepa_jax.weights import files, official, rules


def test_probe_has_no_encoder(tmp_path):
    golden = Golden.named("vjepa2_probe")
    conversion.save(golden.converted(), str(tmp_path / "probe"))
    with pytest.raises(UserError, match="holds a probe, not an encoder"):
        vjepa_jax.load_encoder(str(tmp_path / "probe"))
    models, meta = checkpoint.restore_models(str(tmp_path / "probe"))
    model = AttentiveClassifier(**meta["classifier"])
    params = {"params": models["target"]["0"]}
    logits = jax.jit(model.apply)(params, golden.arrays["x"])
    np.testing.assert_allclose(logits, golden.arrays["y"], atol=1e-4)


def test_exported_probe_is_read_as_the_same_family(tmp_path):
    """Only V-JEPA's probe has an output projection, which nothing uses."""
    pytest.importorskip("torch")
    conversion.save(Golden.named("vjepa1_probe").converted(), str(tmp_path / "probe"))
    file = str(tmp_path / "probe.pt")
    conversion.export_official(str(tmp_path / "probe"), file)
    again = conversion.convert(
        file, str(tmp_path / "again"), official.Hints(num_heads=4)
    )
    assert again.meta["classifier"]["blocks_on_query"]


@pytest.mark.parametrize("names", [("verb", "noun", "action"), ("action",)])
def test_probe_of_action_anticipation(rng, names):
    """Queries do not see each other: one probe equals several of one query each."""
    golden = Golden.named("vjepa2_probe")
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
        file = files.sort_parts(content, "golden")
        converted = conversion.import_file(file, hints)
        fields = json.loads(json.dumps(converted.meta["classifier"]))  # as stored
        model = AttentiveClassifier(**fields)
        params = {"params": converted.target["0"]}
        return converted, jax.jit(model.apply)(params, golden.arrays["x"])

    converted, logits = run({"classifiers": [state]})
    assert set(logits) == set(names)
    for name, single in zip(names, singles, strict=True):
        np.testing.assert_allclose(logits[name], run(single)[1], atol=1e-5)
    parts = conversion.export_parts({"target": converted.target}, converted.meta)
    (exported,) = parts["classifiers"]
    wanted = rules.strip_prefixes(state)
    assert set(exported) == set(wanted)
    for name, value in exported.items():
        assert value.tobytes() == wanted[name].tobytes(), name
