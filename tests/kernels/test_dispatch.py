"""Which backend a call gets, why, and how the others are refused; also for devices that this machine does not have."""

import pytest
import torch

from longtrain.kernels import dispatch, explain, launching
from longtrain.kernels.dispatch import choose_backend

OPERATORS = list(dispatch._BACKENDS)
WITH_KERNELS = [name for name in OPERATORS if "triton" in dispatch._BACKENDS[name]]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with an H100 and Triton."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: name)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_cpu_gets_torch_and_triton_is_refused_there(operator: str) -> None:
    assert choose_backend(operator, "auto", device="cpu", dtype=torch.bfloat16) == "torch"
    assert choose_backend(operator, "reference", device="cpu") == "reference"
    reason = r" \(Triton (needs a GPU|is not installed)" if operator in WITH_KERNELS else ", expected"
    with pytest.raises(ValueError, match=f"backend: got 'triton'{reason}"):
        choose_backend(operator, "triton", device="cpu")
    with pytest.raises(ValueError, match=f"backend: got 'fastest', expected for {operator} on cpu: 'auto', 'torch'"):
        choose_backend(operator, "fastest", device="cpu")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("operator", WITH_KERNELS)
def test_a_gpu_gets_triton_where_its_kernels_can(operator: str) -> None:
    def chosen(backend: str = "auto", **given: object) -> str:
        return choose_backend(operator, backend, device="cuda", **given)  # pyright: ignore[reportArgumentType]

    assert chosen(dtype=torch.bfloat16, widths={"K": 256, "V": 64}) == "triton"
    assert chosen("torch", dtype=torch.bfloat16) == "torch"
    otherwise = "chunked" if operator == "softmax_attention" else "torch"
    assert chosen(dtype=torch.float64) == otherwise
    assert chosen(dtype=torch.float32, widths={"K": 64, "V": 257}) == otherwise
    with pytest.raises(ValueError, match=r"got 'triton' \(the Triton kernels compute in float32, not in float64\)"):
        chosen("triton", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"got 'triton' \(the Triton kernels take K up to 256, not 300\)"):
        chosen("triton", widths={"K": 300})


@pytest.mark.usefixtures("hopper")
def test_old_cards_and_other_devices_are_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(ValueError, match="compute capability 8.0"):
        choose_backend("linear_attention", "triton", device="cuda")
    with pytest.raises(ValueError, match="do not run on mps"):
        choose_backend("linear_attention", "triton", device="mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no GPU here"):
        choose_backend("linear_attention", "triton", device="cuda")


@pytest.mark.usefixtures("hopper")
def test_explain_says_what_runs_and_why_not_the_others() -> None:
    said = explain("softmax_attention", device="cuda", dtype=torch.float64)
    assert said.startswith("softmax_attention with backend='auto' on cuda runs 'chunked': ")
    assert "'triton' cannot run here: the Triton kernels compute in float32, not in float64" in said
    assert "'reference' also there: " in said
    assert "runs 'triton'" in explain("softmax_attention", device="cuda", dtype=torch.bfloat16, widths={"K": 128})
    with pytest.raises(ValueError, match="operator: got 'softmax', expected one of 'softmax_attention'"):
        explain("softmax")
    with pytest.raises(ValueError, match="backend: got 'triton'"):
        explain("softmax_attention", backend="triton", device="cpu")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("capability", "table"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "gfx942"),
        ((8, 9), "gfx942"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
    ],
)
def test_cards_get_the_configurations_that_fit_them(
    capability: tuple[int, int], table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert launching.architecture(torch.device("cuda")) == table
    assert launching.architecture(torch.device("cpu")) == "gfx942"
