"""The one error that a user can cause: a setting that can't be used."""


class SettingError(ValueError):
    """A setting that cannot be used: one sentence naming the field, what it held and what is allowed."""
