"""Installation; versions that were tested together are pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent

# what lmms-eval imports to run a task; itself it asks for others that exclude these (docs/evaluation.md)
LMMS = ["accelerate", "datasets", "evaluate", "loguru", "pytablewriter", "pytz", "sacrebleu", "tenacity"]

setup(
    name="fvlm",
    version="0.1.0",
    description="Training system for the foveated vision-language model: one token a video frame",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    # fvlm/kernels is a link to the top-level folder: found as a namespace package, shipped as fvlm.kernels
    packages=find_namespace_packages(include=["fvlm", "fvlm.*"]),
    package_data={"fvlm.kernels": ["tuned/*.json"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "tokenizers",
        "huggingface-hub",
        "safetensors",
        "numpy",
        "deepspeed>=0.19",
        "webdataset>=1.0",
        "wandb",
        "av>=14",
        "pillow",
        "simplejpeg",
        "PyYAML",
        "pyarrow",
        "aiohttp",
        "tqdm",
        "psutil",
        "matplotlib",
    ],
    extras_require={
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "kernels",
            "setuptools>=70.1",
            "triton>=3.6",
            "ray>=2.60",
            "imageio-ffmpeg>=0.6",
            "pycocoevalcap>=1.2",
            "peft>=0.18",
            "selenium>=4.40",
            "nbclient>=0.10",
            "ipykernel>=7",
            "gradio>=6",
            *LMMS,
        ],
        "gpu": ["triton>=3.6"],
        "ray": ["ray>=2.60"],
        "lora": ["peft>=0.18"],
        "eval": ["pycocoevalcap>=1.2"],
        "demo": ["gradio>=6"],
        "lmms": LMMS,
    },
    entry_points={"lmms_eval.models": ["fvlm = fvlm.hub.lmms_eval:manifest"]},
)
