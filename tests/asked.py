"""What a role's requests ask for, for tests that need no config file."""

from __future__ import annotations

from typing import Any

from tasks.core.config_generation import GeneratorConfig
from tasks.core.generation import RoleGeneration, resolve_role


def generation(**fields: Any) -> RoleGeneration:
    """The generator's fields: these, and the defaults."""
    return resolve_role("generator", GeneratorConfig(**fields), {}, None)
