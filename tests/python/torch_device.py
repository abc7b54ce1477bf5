"""Where tests with PyTorch put their tensors: on the GPU if there is one. The CPU's results are checked where there is none."""

import pytest

torch = pytest.importorskip("torch")
heed = pytest.importorskip("heed", reason="needs PYTHONPATH=<build>/python")

torch.set_num_threads(1)  # small tensors; threads that wait for each other would be most of the time

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_backward = pytest.mark.skipif(DEVICE == "cuda" and "cuda/attention_bwd" not in heed.info(),
                                    reason="no backward pass on this GPU")


@pytest.fixture(autouse=True)
def seeded():
    """Tensors are made on DEVICE unless a test says where."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield
