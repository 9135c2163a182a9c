from io import BytesIO

import numpy as np
import pytest
import torch

from app.engines import EngineError
from app.engines.pytorch import PytorchEngine
from models.bundle import ArtifactFormat, BundleError
from tests.app.engines import needs_gpu
from tests.bundles import SIDE


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("artifact_format", ["torchscript", "torch_export"])
def test_a_file_that_is_no_program_is_refused(artifact_format: str) -> None:
    with pytest.raises(BundleError, match=r"torch cannot load model\.pt"):
        PytorchEngine("model.pt", b"not a program", artifact_format, "cpu", 1, 8)


def test_torch_names_a_gpu_that_is_not_there() -> None:
    with pytest.raises(EngineError, match="MMTL_DEVICE=cuda:99"):
        PytorchEngine("model.pt2", b"", "torch_export", "cuda:99", 1, 8)


class Program(torch.nn.Module):
    """Answers with a mean, and with what a constant that it makes itself is added to."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        means = images.float().mean(dim=(1, 2, 3))
        ages = torch.arange(5, dtype=torch.float32, device=images.device)
        return {"mean": means, "ages": means[:, None] + ages}


@needs_gpu
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("artifact_format", ["torchscript", "torch_export"])
def test_a_gpu_runs_torch_artifacts_at_any_batch_size(artifact_format: ArtifactFormat) -> None:
    images = np.random.default_rng(0).integers(0, 255, (3, SIDE, SIDE, 3), np.uint8)
    example = torch.from_numpy(images)
    content = BytesIO()
    if artifact_format == "torchscript":
        torch.jit.save(torch.jit.script(Program()), content)
    else:
        free = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
        program = torch.export.export(Program(), (example,), dynamic_shapes=free)
        torch.export.save(program, content)
    engine = PytorchEngine("model.pt", content.getvalue(), artifact_format, "cuda:0", 1, 4)
    for count in (1, 2, 3, 3):
        found = engine.run(images[:count])
        means = images[:count].astype(np.float32).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(found["mean"], means, rtol=1e-4)
        np.testing.assert_allclose(found["ages"], means[:, None] + np.arange(5), rtol=1e-4)
