"""The error for a setting that can't be used."""


class SettingError(ValueError):
    """A setting that can't be used: one sentence with the field, what it held and what is allowed."""
