-- Who may connect, read and write, in the database that psql is connected to, as a superuser; the roles are those of roles.sql.
\set ON_ERROR_STOP on
REVOKE ALL ON DATABASE memcontrol FROM PUBLIC;
GRANT CONNECT ON DATABASE memcontrol TO memcontrol_reader;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT CREATE, USAGE ON SCHEMA public TO memcontrol;
GRANT USAGE ON SCHEMA public TO memcontrol_reader;
-- Optuna makes its tables when the first search begins; what the owner makes from now on, the reader may read.
ALTER DEFAULT PRIVILEGES FOR ROLE memcontrol IN SCHEMA public GRANT SELECT ON TABLES TO memcontrol_reader;
ALTER DEFAULT PRIVILEGES FOR ROLE memcontrol IN SCHEMA public GRANT SELECT ON SEQUENCES TO memcontrol_reader;
