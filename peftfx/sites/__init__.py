"""Sites: the adaptable places of a model, as plain data; targets, which pick among them."""

from peftfx.sites.site import Call, Heads, Part, Site
from peftfx.sites.sites import Sites

__all__ = ["Call", "Heads", "Part", "Site", "Sites"]
