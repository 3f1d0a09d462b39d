"""Write infra/.env, the passwords of infra/compose.yaml: `dgpo secrets`, or `python3 -m infra.secrets`.

Only the standard library is used, so that it runs where nothing is installed. A value that is there is never
changed, what a newer version needs is added, and no value is printed.
"""

import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

ENV = Path(__file__).resolve().parent / ".env"
HEAD = """\
# Secrets of infra/compose.yaml, written by `dgpo secrets`. Not for git. To change the databases' passwords,
# change them in Postgres too: it took these when its volume was made.
"""


def _password() -> str:
    return secrets.token_urlsafe(32)  # letters, digits, - and _: needs quoting nowhere


GENERATED: dict[str, Callable[[], str]] = {
    "POSTGRES_PASSWORD": _password,
    "PREFECT_DB_PASSWORD": _password,
    "MLFLOW_DB_PASSWORD": _password,
    "PREFECT_AUTH_STRING": lambda: f"admin:{_password()}",  # Prefect's form: user:password
    "MLFLOW_ADMIN_PASSWORD": _password,
    "MLFLOW_SESSION_KEY": _password,
    "QDRANT_API_KEY": _password,
    # No secrets: whose files the workers write in the checkout.
    "DGPO_UID": lambda: str(os.getuid()),
    "DGPO_GID": lambda: str(os.getgid()),
}


def write(file: Path = ENV) -> list[str]:
    """Add what is missing to `file`, which its owner alone can read. Return the names added."""
    old = file.read_text(encoding="utf-8") if file.exists() else HEAD
    present = {line.split("=", 1)[0].strip() for line in old.splitlines() if "=" in line}
    missing = [name for name in GENERATED if name not in present]
    lines = "".join(f"{name}={GENERATED[name]()}\n" for name in missing)
    if missing:
        text = old if old.endswith("\n") else f"{old}\n"
        part = file.with_name(file.name + ".part")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as output:
            output.write(text + lines)
        os.replace(part, file)
    file.chmod(0o600)
    return missing


def main() -> int:
    """Write the file and say what was added. Return the exit code."""
    try:
        added = write()
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{ENV}: {'added ' + ', '.join(added) if added else 'complete, nothing changed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
