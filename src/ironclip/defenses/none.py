"""The undefended classifier, as a row like any other: what every gain is measured against."""

from __future__ import annotations

from typing import ClassVar

from ironclip.core.spec import method
from ironclip.core.types import Classifier, Info, State
from ironclip.core.zeroshot import ZeroShot


@method
class NoDefense:
    """Returns the classifier itself."""

    info: ClassVar[Info] = Info(
        name="none",
        title="undefended",
        paradigm="baseline",
        kind="none",
        paper="Radford et al. 2021, arXiv 2103.00020",
    )

    def apply(self, clf: ZeroShot, state: State | None = None) -> Classifier:
        """The very same classifier."""
        return clf
