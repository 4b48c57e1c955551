"""What one request sees of the configuration: a snapshot. A reload swaps it; requests in flight keep the old one."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ext.rate_counters import RateCounters
from proxy.catalog.catalog import Catalog
from proxy.config import Config
from proxy.dialects.call import Task
from proxy.dialects.decode import Defaults
from proxy.gate.keys import Keys
from proxy.gate.limits import Limits
from proxy.providers.base import Provider
from proxy.routing.router import Router
from proxy.server.packing import Packer
from proxy.sizes import byte_size
from scheduler.model import LatencyClass


class State(msgspec.Struct, frozen=True):
    """Immutable, and read once per request. `providers` are by backend name."""

    config: Config
    catalog: Catalog
    router: Router
    keys: Keys
    providers: Mapping[str, Provider]
    defaults: Mapping[Task, Defaults]
    max_body: int
    max_header: int
    max_depth: int
    deadlines_ms: Mapping[LatencyClass, float]
    packer: Packer | None  # None: no embeddings are packed
    limits: Limits

    @classmethod
    def of(
        cls, config: Config, catalog: Catalog, keys: Keys, providers: Mapping[str, Provider], counters: RateCounters
    ) -> State:
        """The snapshot of a checked configuration."""
        return cls(
            config=config,
            catalog=catalog,
            router=Router(catalog),
            keys=keys,
            providers=providers,
            defaults={
                task: Defaults(
                    model=catalog.default_for(task),
                    latency_class=LatencyClass[config.defaults.latency_class.upper()],
                    max_depth=config.limits.max_json_depth,
                )
                for task in Task
            },
            max_body=byte_size(config.limits.max_body),
            max_header=byte_size(config.limits.max_header),
            max_depth=config.limits.max_json_depth,
            packer=Packer(config.limits.embed_window_ms / 1000) if config.limits.embed_window_ms else None,
            limits=Limits(config.limits, keys.tenants, counters),
            deadlines_ms={
                LatencyClass[name.upper()]: each.deadline_ms
                for name, each in config.classes.items()
                if each.deadline_ms is not None
            },
        )
