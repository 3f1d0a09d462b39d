#!/usr/bin/env bash
# Run once by the image of Postgres, when its volume is empty: a database for each server, whose user owns it and
# sees no other.
set -euo pipefail

make_database() { # name, password
	# psql quotes the values (:"name", :'password'); on standard input, so that no password is on a command line
	NAME=$1 PASSWORD=$2 psql --set ON_ERROR_STOP=1 --no-psqlrc --quiet \
		--username "$POSTGRES_USER" --dbname "${POSTGRES_DB:-postgres}" <<'SQL'
\getenv name NAME
\getenv password PASSWORD
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE CONNECT, TEMPORARY ON DATABASE :"name" FROM PUBLIC;
SQL
}

make_database prefect "$PREFECT_DB_PASSWORD"
make_database mlflow "$MLFLOW_DB_PASSWORD"
