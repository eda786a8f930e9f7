#!/usr/bin/env python3
"""Runs a program as Python would, and writes down every SQL statement that it executes: traced.py FILE PROGRAM [ARGUMENT...]

One JSON string a line, with the values in place of the marks, as sqlite3_expanded_sql() writes them.
"""

import json
import os
import runpy
import sqlite3
import sys
from typing import Any

connect = sqlite3.connect


def main() -> None:
    file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def traced(*values: Any, **more: Any) -> sqlite3.Connection:
        db = connect(*values, **more)
        db.set_trace_callback(lambda sql: os.write(file, json.dumps(sql).encode() + b"\n"))
        return db

    sqlite3.connect = traced
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
