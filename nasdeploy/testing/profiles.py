"""The contract of a hardware profile."""

from __future__ import annotations

import json
from pathlib import Path

from nasdeploy.errors import ConfigError
from nasdeploy.exporters.opsets import check_opset
from nasdeploy.profiles import HardwareProfile, load_profile


class ProfileContract:
    """A hardware profile. ``profile``: its name, or the path of its TOML file."""

    profile: str | Path

    def load(self) -> HardwareProfile:
        """Return the profile."""
        return load_profile(self.profile)

    def test_a_profile_that_is_loaded_by_name_has_that_name(self) -> None:
        if isinstance(self.profile, str) and not self.profile.endswith(".toml"):
            name = self.load().name
            assert name == self.profile, f"name = '{name}'; expected '{self.profile}'"

    def test_its_canonical_form_leads_back_to_it(self) -> None:
        profile = self.load()
        again = HardwareProfile.from_dict(json.loads(json.dumps(profile.to_dict())))
        assert again == profile, f"{profile.to_dict()} reads as {again.to_dict()}"

    def test_it_limits_something(self) -> None:
        assert self.load().budget.items(), "budget: expected a cap or a coefficient for at least one metric"

    def test_its_opset_can_be_written(self) -> None:
        try:
            check_opset(self.load().runtime.opset)
        except ConfigError as error:
            raise AssertionError(f"runtime.{error}") from error
