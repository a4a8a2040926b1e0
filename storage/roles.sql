-- Two roles and a database, as a superuser:
--   psql -v owner_password="$OWNER_PASSWORD" -v reader_password="$READER_PASSWORD" -f roles.sql
-- memcontrol owns the tables and is what `storage:` of a study names; memcontrol_reader may only read, for the dashboard.
\set ON_ERROR_STOP on
CREATE ROLE memcontrol LOGIN PASSWORD :'owner_password';
CREATE ROLE memcontrol_reader LOGIN PASSWORD :'reader_password';
ALTER ROLE memcontrol_reader SET default_transaction_read_only = on;
CREATE DATABASE memcontrol OWNER memcontrol;
\connect memcontrol
\ir grants.sql
