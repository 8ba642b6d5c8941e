"""The keys of rollout servers. A secret has no place in a config, which is printed and saved: this file asks for it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

API_KEY, ADMIN_KEY = "SGLANG_API_KEY", "SGLANG_ADMIN_KEY"


@dataclass(frozen=True)
class Keys:
    """The ordinary key and the one that control endpoints want where a server has both; "" is none."""

    api: str = field(default="", repr=False)
    admin: str = field(default="", repr=False)

    def headers(self, control: bool) -> dict[str, str]:
        """What a request carries; a server without an admin key takes the ordinary one everywhere."""
        key = (self.admin if control else "") or self.api
        return {"Authorization": f"Bearer {key}"} if key else {}


def keys_from_environment() -> Keys:
    """SGLANG_API_KEY and SGLANG_ADMIN_KEY, where they are set."""
    return Keys(os.environ.get(API_KEY, ""), os.environ.get(ADMIN_KEY, ""))
