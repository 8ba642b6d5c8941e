"""Where the rollout servers are and how they are treated: the section `servers` of an RL config."""

from __future__ import annotations

from dataclasses import dataclass

UPDATE_MODES = ("retract", "abort", "in_place")
REPETITION_STOPS = ("stream", "segments", "processor")


@dataclass(frozen=True)
class ServersConfig:
    """SGLang servers in place of the local engine.

    Keys are no part of it: SGLANG_API_KEY and SGLANG_ADMIN_KEY of the environment are used where they are set.

    Attributes:
        urls: base URL of each server, "http://host:30000".
        gateway: URL that answers are asked of instead, a router before those servers; weights go to each of them.
        weights_folder: where weights are put for the servers to read, in a folder of the run's name; "" is `weights/`
            in the run folder. Every server has to see it.
        weights_folder_there: its path as the servers see it; "" is the same.
        weights_dtype: dtype of the weights there; "" is that of the parameters.
        update_mode: what becomes of answers under way when weights change. "retract": they go back to the server's
            queue and continue with the new weights, their prefix computed anew. "abort": the server hands back what
            there is, and is asked to continue from there. "in_place": they continue on keys and values of the old
            weights.
        repetition_stop: how answers are watched. "stream": token by token, and aborted as soon as they end. "segments":
            in requests of `segment_tokens`, for servers that cannot stream in disjoint pieces. "processor": by the
            server itself, which runs `m1jax.serving.repetition`; it has to be started for that.
        segment_tokens: tokens of a request in the second way, and later a quarter of the answer so far, so that what is
            sent stays linear in its length.
        stream_interval: tokens of a streamed event; 0 leaves it to the server.
        in_flight: requests at a server at a time.
        attempts: failures in a row, without a token gained, that one answer is allowed.
        patience_s: seconds to wait for a server when none is left, or for any sign of progress, before the run saves
            and exits with code 75.
        stall_s: seconds without a byte after which a streamed answer is given up, and after which the server of another
            one has to be healthy; of any deadline the fixed part. Where requests queue for longer in a server, lower
            `in_flight`.
        slowest_tokens_per_s: the speed that deadlines start from; later it is the slowest one seen.
        update_s: seconds that a server may take to read new weights.
    """

    urls: tuple[str, ...]
    gateway: str = ""
    weights_folder: str = ""
    weights_folder_there: str = ""
    weights_dtype: str = ""
    update_mode: str = "retract"
    repetition_stop: str = "stream"
    segment_tokens: int = 2048
    stream_interval: int = 32
    in_flight: int = 256
    attempts: int = 12
    patience_s: float = 600.0
    stall_s: float = 120.0
    slowest_tokens_per_s: float = 1.0
    update_s: float = 1800.0

    def __post_init__(self):
        if not self.urls:
            raise ValueError("urls: () names no server; give at least one, or leave the section servers out")
        for name, urls in (("urls", self.urls), ("gateway", (self.gateway,) if self.gateway else ())):
            for url in urls:
                if not url.startswith(("http://", "https://")) or url.endswith("/"):
                    raise ValueError(f"{name}: {url!r} must look like http://host:30000, without a slash at the end")
                if "@" in url:
                    raise ValueError(f"{name}: a URL with a user in it would end in logs; set SGLANG_API_KEY instead")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError(f"urls: {self.urls} names a server twice")
        for name, options in (("update_mode", UPDATE_MODES), ("repetition_stop", REPETITION_STOPS)):
            if getattr(self, name) not in options:
                raise ValueError(f"{name}: {getattr(self, name)!r} must be one of {options}")
        if self.weights_dtype not in ("", "float32", "bfloat16"):
            raise ValueError(f"weights_dtype: {self.weights_dtype!r} must be float32, bfloat16 or ''")
        for name in ("segment_tokens", "in_flight", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.stream_interval < 0:
            raise ValueError(f"stream_interval: {self.stream_interval} must be at least 0")
        for name in ("patience_s", "stall_s", "slowest_tokens_per_s", "update_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be above 0")
