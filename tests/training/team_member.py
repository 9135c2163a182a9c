"""One process of a team: `python -m tests.training.team_member RUN`, as torchrun starts it.

Where RUN holds a file `dies`, the second process takes it away and is killed in the second epoch.
"""

import os
import signal
import sys
from pathlib import Path

from timm.layers import DropPath
from torch import Tensor, nn

from training import fit as fitting
from training.run import Run


class Backbone(nn.Module):
    """Two convolutions, one of which is left out by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 5, stride=4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.drop = DropPath(0.3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        return features + self.drop(self.second(features))


def build(*_: object):
    """In the place of `build_feature_map`."""
    return Backbone(), 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def main() -> None:
    run = Run(Path(sys.argv[1]))
    dies = run.folder / "dies"
    draw = fitting.draw

    def draw_or_die(positions, targets, config, epoch):
        if epoch == 1 and os.environ["RANK"] == "1" and dies.exists():
            dies.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(positions, targets, config, epoch)

    fitting.build_feature_map = build
    fitting.draw = draw_or_die
    fitting.fit(run, workers=0)


if __name__ == "__main__":
    main()
