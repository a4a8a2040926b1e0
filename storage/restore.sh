#!/usr/bin/env bash
# Puts a dump of backup.sh into an empty database, all or nothing: restore.sh FILE. Refuses one that already holds studies.
set -euo pipefail
[ $# = 1 ] || { echo "usage: restore.sh FILE" >&2; exit 2; }
file=$1
[ -r "$file" ] || { echo "$file cannot be read" >&2; exit 1; }
export PGDATABASE=${PGDATABASE:-memcontrol}
if [ -n "$(psql --no-psqlrc --tuples-only --no-align --command="SELECT to_regclass('public.studies')")" ]; then
    echo "database $PGDATABASE already holds studies; restore into an empty one" >&2
    exit 1
fi
pg_restore --no-owner --single-transaction --exit-on-error --dbname="$PGDATABASE" "$file"
psql --no-psqlrc --tuples-only --no-align --command="SELECT count(*) || ' studies, ' || (SELECT count(*) FROM trials) || ' trials' FROM studies"
