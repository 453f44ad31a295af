"""Equal to Hugging Face's VJEPA2, both imported and exported."""

import json

import jax
import numpy as np
import pytest

from vjepa_jax import load_encoder
from vjepa_jax.base.errors import UserError
from vjepa_jax.config.saved import restored
from vjepa_jax.models import registry
from vjepa_jax.models.heads import AttentiveClassifier
from vjepa_jax.models.positions import Grid
from vjepa_jax.program import build
from vjepa_jax.run import checkpoint, conversion
from vjepa_jax.weights import huggingface, official

pytestmark = pytest.mark.torch

MISSING = "needs PyTorch and transformers: pip install 'vjepa_jax[torch]'"
TOLERANCE = 2e-5  # max error over the output's standard deviation
GRID: Grid = (2, 4, 4)


def import_torch():
    torch = pytest.importorskip("torch", reason=MISSING)
    return torch, pytest.importorskip("transformers", reason=MISSING)


def make_model(kind):
    """Make a tiny model without arrays of zeros or ones."""
    torch, transformers = import_torch()
    config = transformers.VJEPA2Config(
        crop_size=64,
        frames_per_clip=4,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=3.0,
        num_pooler_layers=2,
        num_labels=5,
        pred_hidden_size=32,
        pred_num_hidden_layers=2,
        pred_num_attention_heads=2,
        pred_num_mask_tokens=3,
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def clips(seed=0):
    """Return normalised clips [B, T, H, W, 3]."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, 4, 64, 64, 3), np.float32)


def apply(model, video, **kwargs):
    torch, _ = import_torch()
    with torch.no_grad():
        return model(torch.from_numpy(video.transpose(0, 1, 4, 2, 3)), **kwargs)


def error(actual, wanted):
    wanted = wanted.numpy()
    return np.abs(np.asarray(actual).reshape(wanted.shape) - wanted).max() / np.std(
        wanted
    )


@pytest.fixture(scope="module")
def model():
    return make_model("VJEPA2Model")


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    base = tmp_path_factory.mktemp("huggingface")
    model.save_pretrained(base / "theirs")
    conversion.convert(str(base / "theirs"), str(base / "ours"))
    return str(base / "ours")


def test_features_equal_theirs(model, converted, record_property):
    encode, video = load_encoder(converted), clips()
    with jax.default_matmul_precision("highest"):
        features = encode(video)
    assert features.shape == (2, *GRID, 64)
    found = error(features, apply(model, video, skip_predictor=True).last_hidden_state)
    record_property("error", str(found))
    print(f"error {found:.1e}")
    assert found <= TOLERANCE


def test_one_frame_equals_theirs(model, converted):
    frame = clips()[:, :1]
    with jax.default_matmul_precision("highest"):
        features = load_encoder(converted)(frame)
    assert error(features, apply(model, frame, skip_predictor=True)[0]) <= TOLERANCE


def test_predictions_equal_theirs(model, converted):
    torch, _ = import_torch()
    models, meta = checkpoint.restore_models(converted)
    config = restored(meta["config"])
    _, predictor = build.make_models(config)
    order = np.random.default_rng(1).permutation(32)
    context, target = (np.tile(np.sort(part), (2, 1)) for part in np.split(order, [12]))
    video = clips()
    with jax.default_matmul_precision("highest"):
        features = load_encoder(converted)(video).reshape(2, -1, 64)
        features = np.take_along_axis(np.asarray(features), context[..., None], axis=1)
        # Theirs always takes the second mask token.
        predict = jax.jit(predictor.apply, static_argnums=(4, 5))
        params = {"params": models["predictor"]}
        ours, _ = predict(params, features, context, target, GRID, 1)
    masks = {"context_mask": context, "target_mask": target}
    masks = {name: [torch.from_numpy(value)] for name, value in masks.items()}
    theirs = apply(model, video, **masks).predictor_output.last_hidden_state
    assert error(ours, theirs) <= TOLERANCE


def test_exported_model_gives_the_same(model, converted, tmp_path):
    torch, transformers = import_torch()
    conversion.export_huggingface(converted, str(tmp_path / "back"))
    again, report = transformers.VJEPA2Model.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report.values()), report
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    wanted = apply(model, clips())
    found = apply(again.eval(), clips())
    assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)


def test_classifier_goes_both_ways(tmp_path):
    torch, transformers = import_torch()
    theirs = make_model("VJEPA2ForVideoClassification")
    theirs.save_pretrained(tmp_path / "theirs")
    conversion.convert(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    models, meta = checkpoint.restore_models(str(tmp_path / "ours"))
    head = AttentiveClassifier(**meta["classifier"])
    out = apply(theirs, clips())
    with jax.default_matmul_precision("highest"):
        tokens = load_encoder(str(tmp_path / "ours"))(clips()).reshape(2, -1, 64)
        logits = jax.jit(head.apply)({"params": models["classifier"]}, tokens)
    # Their pooler's layer norms have another epsilon than the official ones.
    assert error(logits, out.logits) <= 1e-3
    conversion.export_huggingface(str(tmp_path / "ours"), str(tmp_path / "back"))
    again = transformers.VJEPA2ForVideoClassification.from_pretrained(tmp_path / "back")
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_official_file_and_back(converted, tmp_path):
    torch, _ = import_torch()
    conversion.export_official(converted, str(tmp_path / "x.pt"))
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    assert set(content) == {"encoder", "predictor"}
    assert all(name.startswith("module.backbone.") for name in content["encoder"])
    content |= {"epoch": 3, "opt": {"state": {0: {"step": torch.ones(1)}}}}
    torch.save(content, tmp_path / "run.pth.tar")
    hints = official.Hints(num_heads=2, predictor_heads=2)
    again = conversion.convert(
        str(tmp_path / "run.pth.tar"), str(tmp_path / "o"), hints
    )
    assert set(again.ignored) == {"epoch", "opt"}
    models, _ = checkpoint.restore_models(converted)
    equal = jax.tree.map(np.array_equal, again.target, dict(models["target"]))
    assert all(jax.tree.leaves(equal))


def test_file_that_is_not_a_pickle_of_weights(tmp_path):
    torch, _ = import_torch()
    (tmp_path / "text.pt").write_bytes(b"not a pickle")
    torch.save({"encoder": tmp_path}, tmp_path / "object.pt")
    for name in ("text.pt", "object.pt"):
        with pytest.raises(UserError, match=f"{name} is not a file of PyTorch weights"):
            conversion.convert(str(tmp_path / name), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_folder_of_another_model(converted, model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / huggingface.CONFIG_FILE
    path.write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match="is of a 'vit', not of a V-JEPA 2"):
        conversion.convert(str(tmp_path / "m"), str(tmp_path / "out"))
    with pytest.raises(UserError, match="exists: give another --output"):
        conversion.export_huggingface(converted, str(tmp_path / "m"))


@pytest.mark.parametrize("size", ["large", "huge", "giant", "gigantic"])
def test_mlp_ratio_survives_truncation(size):
    size = registry.SIZES[size]
    ratio = huggingface.mlp_ratio(size.width, size.mlp_dim)
    assert int(size.width * ratio) == size.mlp_dim
