#!/usr/bin/env bash
# Run once by the PostgreSQL container, on an empty volume.
set -euo pipefail
psql --username="${POSTGRES_USER:-postgres}" -v owner_password="$OWNER_PASSWORD" -v reader_password="$READER_PASSWORD" -f /storage/roles.sql
