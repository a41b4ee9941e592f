"""Read YAML configurations, and check them by a schema."""
from typing import Any, Dict, Sequence

import jsonschema  # type: ignore[import-untyped]
import yaml  # type: ignore[import-untyped]

from ddinit import files


def read_configuration(paths: Sequence[str], schema: str) -> Dict[str, Any]:
    """Return the configuration in YAML or JSON files, checked by the JSON schema in a YAML file.

    The keys of later files replace those of earlier ones. Raises ValueError naming the files and
    the setting that is unknown, missing or wrong.
    """
    config: Dict[str, Any] = {}
    for path in paths:
        config.update(_read(path))
    error = jsonschema.exceptions.best_match(
        jsonschema.Draft7Validator(_read(schema)).iter_errors(config))
    if error is not None:
        place = "/".join(map(str, error.absolute_path))
        raise ValueError("%s: %s%s" % (", ".join(paths), place and place + ": ", error.message))
    return config


def _read(path: str) -> Dict[str, Any]:
    try:
        content = yaml.safe_load(files.read_text(path))
    except yaml.YAMLError as error:
        raise ValueError("%s: the file is not YAML (%s)" % (path, error)) from error
    if not isinstance(content, dict):
        raise ValueError("%s: the file is not a configuration, which is a mapping" % path)
    return content
