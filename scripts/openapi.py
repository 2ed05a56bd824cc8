"""Writes the Platform API's OpenAPI document: `python scripts/openapi.py docs/openapi.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from platform_api.app import make_app
from platform_api.config import ApiSettings

Path(sys.argv[1]).write_text(json.dumps(make_app(ApiSettings()).openapi(), indent=1) + "\n", encoding="utf-8")
