-- Two roles and a database, as a superuser:
--   psql -v owner_password="$OWNER_PASSWORD" -v reader_password="$READER_PASSWORD" -f roles.sql
-- memcontrol owns the tables and is what `storage:` of a study names; memcontrol_reader may only read, for the dashboard.
\set ON_ERROR_STOP on
CREATE ROLE memcontrol LOGIN PASSWORD :'owner_password';
CREATE ROLE memcontrol_reader LOGIN PASSWORD :'reader_password';
ALTER ROLE memcontrol_reader SET default_transaction_read_only = on;
CREATE DATABASE memcontrol OWNER memcontrol;
REVOKE ALL ON DATABASE memcontrol FROM PUBLIC;
GRANT CONNECT ON DATABASE memcontrol TO memcontrol_reader;
\connect memcontrol
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT CREATE, USAGE ON SCHEMA public TO memcontrol;
GRANT USAGE ON SCHEMA public TO memcontrol_reader;
-- Optuna makes its tables when the first search begins; what the owner makes from now on, the reader may read.
ALTER DEFAULT PRIVILEGES FOR ROLE memcontrol IN SCHEMA public GRANT SELECT ON TABLES TO memcontrol_reader;
ALTER DEFAULT PRIVILEGES FOR ROLE memcontrol IN SCHEMA public GRANT SELECT ON SEQUENCES TO memcontrol_reader;
