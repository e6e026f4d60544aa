"""A cold import is light: no backend, no model library, no GPU; and the folder `kernels` refuses its bare name."""

import pytest

IMPORT_ALL = "import transfusion, transfusion.kernels"
HEAVY = ("triton", "diffusers", "transformers", "matplotlib", "tensorboard", "tokenizers")


def test_import_is_light(run_python, tmp_path):
    code = f"""
import sys, torch
before = set(sys.modules)
{IMPORT_ALL}
print(*sorted({{name.split(".")[0] for name in set(sys.modules) - before}} & set({HEAVY})))
"""
    assert run_python(code, cwd=tmp_path).stdout.split() == []


def test_import_touches_no_gpu(run_python, tmp_path):
    code = f"""
import torch
def touched(*args, **kwargs):
    raise AssertionError("the import asked for a GPU")
for name in ("_lazy_init", "is_available", "device_count", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, touched)
{IMPORT_ALL}
"""
    run_python(code, cwd=tmp_path)


@pytest.mark.parametrize("blocked", ["triton", "diffusers", "transformers", "kernels"])
def test_import_without(blocked, run_python, tmp_path):
    code = f"import sys; sys.modules[{blocked!r}] = None\n{IMPORT_ALL}\ntransfusion.kernels.transfusion_attention"
    run_python(code, cwd=tmp_path)


def test_attention_without_triton_runs_and_says_what_is_missing(run_python, tmp_path):
    code = """
import sys; sys.modules["triton"] = None
import torch
from transfusion.kernels import IntervalMask, transfusion_attention
from transfusion.kernels.testing import judge
torch.seed()
q, k, v = (torch.randn(1, 2, 50, 16) for _ in range(3))
mask = IntervalMask.causal(50)
gold = transfusion_attention(q.double(), k.double(), v.double(), mask, impl="reference")
eager = transfusion_attention(q, k, v, mask, impl="reference")
verdict = judge(transfusion_attention(q, k, v, mask), eager, gold)
assert verdict.passed, (torch.initial_seed(), verdict)
try:
    transfusion_attention(q, k, v, mask, impl="triton")
except RuntimeError as error:
    print(error)
"""
    assert "triton is not installed" in run_python(code, cwd=tmp_path).stdout


def test_folder_refuses_its_bare_name(root, run_python):
    # `python -c` puts the working directory first on sys.path, where the folder shadows Hugging Face's package.
    done = run_python("import kernels", cwd=root, check=False)
    assert done.returncode == 1
    assert "ImportError" in done.stderr.splitlines()[-1]
    assert "`transfusion.kernels`" in done.stderr.splitlines()[-1]


def test_after_our_import_the_bare_name_is_free_again_in_the_root(root, run_python, tmp_path):
    # transformers and diffusers ask find_spec, and import what it finds
    code = f"""
import importlib.util, sys
{IMPORT_ALL}
found = importlib.util.find_spec("kernels")
print(found and found.origin)
sys.path.insert(1, {str(tmp_path)!r})
import kernels
print(kernels.__file__)
"""
    other = tmp_path / "kernels" / "__init__.py"
    other.parent.mkdir()
    other.write_text("")
    installed, imported = run_python(code, cwd=root).stdout.splitlines()
    assert installed != str(root / "kernels" / "__init__.py")
    assert imported == str(other)
