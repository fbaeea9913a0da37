"""Copy a base with adapters folded in. No merged weight is computed before it is asked for."""

from __future__ import annotations

import copy

from torch import nn

from peftfx.adapters.in_place_merge import merge_into
from peftfx.adapters.merge_report import MergeReport
from peftfx.model.adapted import AdaptedModel
from peftfx.model.merging import merged_graph
from peftfx.twins.twin import copied


def merged_copy(adapted: AdaptedModel) -> tuple[nn.Module, MergeReport]:
    """Copy the base's modules, with its tensors, and with `Deferred` tensors where the active adapters act.

    The adapted model is not changed. The report has its roundings only after the weights have been computed.

    Raises:
        PeftfxError: an active adapter cannot be merged.
    """
    made, memo = copied(adapted.base), dict[int, object]()
    for module in made.modules():  # configs say which tensors a merge unties
        if "config" in vars(module):
            vars(module)["config"] = copy.deepcopy(vars(module)["config"], memo)
    if not adapted.active:
        return made, MergeReport((), 0)
    return made, merge_into(made, merged_graph(adapted), adapted.named.acting(), late=True)
