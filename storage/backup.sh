#!/usr/bin/env bash
# Writes a compressed dump of the database, and only then gives it its name: backup.sh FILE. The server and database are libpq's:
# PGHOST, PGPORT, PGUSER, PGDATABASE (memcontrol by default), the password from PGPASSWORD or ~/.pgpass. Safe during a search.
set -euo pipefail
[ $# = 1 ] || { echo "usage: backup.sh FILE" >&2; exit 2; }
file=$1
export PGDATABASE=${PGDATABASE:-memcontrol}
umask 077
trap 'rm -f "$file.part"' EXIT
pg_dump --format=custom --no-owner --file="$file.part"
pg_restore --list "$file.part" > /dev/null
mv "$file.part" "$file"
echo "$file: $(du -h "$file" | cut -f1)"
