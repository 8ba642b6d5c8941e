"""The keys of rollout servers. A secret has no place in a config, which is printed and saved: this file asks for it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from m1jax.errors import UserError

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
    """SGLANG_API_KEY and SGLANG_ADMIN_KEY, where they are set; a line end behind one is no part of it.

    Raises:
        UserError: one cannot be sent, for it has more than visible ASCII in it.
    """
    keys = {name: os.environ.get(name, "").strip() for name in (API_KEY, ADMIN_KEY)}
    for name, key in keys.items():
        if not all("!" <= letter <= "~" for letter in key):
            raise UserError(f"{name}: has a space, a control character or no ASCII in it, and is sent in a header")
    return Keys(keys[API_KEY], keys[ADMIN_KEY])
