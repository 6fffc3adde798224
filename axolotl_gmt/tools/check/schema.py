"""The JSON schema of a YAML file's keys, by which editors complete them and mark mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, JsonSchemaWarningKind
from pydantic_core import PydanticSerializationError, core_schema

from axolotl_gmt.config import GMTConfig
from axolotl_gmt.errors import UserError
from axolotl_gmt.integrations.axolotl.args import PREFIX, GMTArgs
from axolotl_gmt.tools.check.child import ENVIRONMENT


class _Generator(GenerateJsonSchema):
    """As pydantic's, without titles that repeat a key's name, and for all that Axolotl sets."""

    ignored_warning_kinds: set[JsonSchemaWarningKind] = {"non-serializable-default"}  # noqa: RUF012

    def field_title_should_be_set(self, _schema: object) -> bool:
        return False

    def enum_schema(self, schema: core_schema.EnumSchema) -> JsonSchemaValue:
        """The values of an enum; its names, and any others, where its values are torch's dtypes."""
        try:
            return super().enum_schema(schema)
        except PydanticSerializationError:
            return {"type": "string", "examples": [member.name for member in schema["members"]]}


def gmt_schema() -> dict[str, Any]:
    """The schema of the ``gmt_*`` keys as they stand in a YAML file, with the defaults of a run.

    It says nothing of other keys. Does not need Axolotl.
    """
    return _schema(GMTArgs)


def axolotl_schema() -> dict[str, Any]:
    """The schema of Axolotl's own keys and the ``gmt_*`` keys.

    Keys of plugins, those that Axolotl ships included, are not in it, and allowed. It is made in a
    process of its own, since Axolotl looks for GPUs and for the network as it is imported.

    Raises:
        UserError: If Axolotl cannot be imported.
    """
    result = subprocess.run(
        [sys.executable, "-P", "-m", __name__],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if result.returncode:
        last = next(reversed(result.stderr.splitlines()), "it says nothing")
        raise UserError(f"Axolotl cannot be imported: {last}")
    schema: dict[str, Any] = json.loads(result.stdout)
    return schema


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(schema_generator=_Generator)
    for name, setting in GMTConfig.model_fields.items():
        schema["properties"][PREFIX + name]["default"] = setting.default
    # The plugin refuses them, too.
    known = "|".join(sorted(key.removeprefix(PREFIX) for key in GMTArgs.model_fields))
    return {
        "$schema": _Generator.schema_dialect,
        **schema,
        "title": "Axolotl's config" if model is not GMTArgs else "Gradient-Mask Tuning",
        "patternProperties": {f"^{PREFIX}(?!({known})$)": False},
    }


def main() -> None:
    """Print what :func:`axolotl_schema` returns."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Axolotl and others print there.
    from axolotl.utils.schemas.config import AxolotlInputConfig

    class Config(AxolotlInputConfig, GMTArgs):  # type: ignore[valid-type, misc]
        """The keys of a YAML file for Axolotl with GMT."""

    with answer:
        json.dump(_schema(Config), answer)


if __name__ == "__main__":
    main()
