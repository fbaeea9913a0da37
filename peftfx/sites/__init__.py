"""Sites, the adaptable places of a model, as plain data; and targets, which pick sites."""

from peftfx.sites.site import AttentionSite, Call, HeadedSite, Heads, NormSite, Part, SequenceSite, Site, WeightSite
from peftfx.sites.sites import Sites

__all__ = [
    "AttentionSite",
    "Call",
    "HeadedSite",
    "Heads",
    "NormSite",
    "Part",
    "SequenceSite",
    "Site",
    "Sites",
    "WeightSite",
]
