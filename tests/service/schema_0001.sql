-- A database of schema 0001, as SQLite's .dump writes it but for the booleans, which PostgreSQL reads too.
BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE attempts (
	job_id VARCHAR(64) NOT NULL, 
	attempt INTEGER NOT NULL, 
	driver TEXT, 
	reason TEXT, 
	preempted BOOLEAN NOT NULL, 
	started_at DATETIME NOT NULL, 
	last_seen_at DATETIME NOT NULL, 
	ended_at DATETIME, 
	reference_device_seconds DOUBLE NOT NULL, 
	CONSTRAINT pk_attempts PRIMARY KEY (job_id, attempt), 
	CONSTRAINT fk_attempts_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
INSERT INTO "attempts" VALUES('job_old',1,'host:1',NULL,FALSE,'2026-01-02 03:04:06.678901','2026-01-02 03:04:09.678901','2026-01-02 03:04:09.678901',1.5);
CREATE TABLE front_history (
	job_id VARCHAR(64) NOT NULL, 
	sequence INTEGER NOT NULL, 
	trial_id VARCHAR(100) NOT NULL, 
	hypervolume DOUBLE, 
	size INTEGER NOT NULL, 
	at DATETIME NOT NULL, 
	CONSTRAINT pk_front_history PRIMARY KEY (job_id, sequence), 
	CONSTRAINT fk_front_history_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE, 
	CONSTRAINT fk_front_history_trial_id_trials FOREIGN KEY(trial_id) REFERENCES trials (id) ON DELETE CASCADE
);
INSERT INTO "front_history" VALUES('job_old',1,'trial_done',2.5,1,'2026-01-02 03:04:08.678901');
CREATE TABLE jobs (
	position INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(64) NOT NULL, 
	name TEXT NOT NULL, 
	tenant VARCHAR(100) NOT NULL, 
	state VARCHAR(20) NOT NULL, 
	reason TEXT, 
	spec JSON NOT NULL, 
	directions JSON NOT NULL, 
	priority INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	lease_expires_at DATETIME, 
	submission_id TEXT, 
	idempotency_key VARCHAR(255), 
	idempotency_digest VARCHAR(64), 
	hypervolume DOUBLE, 
	reference_point JSON, 
	created_at DATETIME NOT NULL, 
	started_at DATETIME, 
	ended_at DATETIME, 
	CONSTRAINT uq_jobs_id UNIQUE (id), 
	CONSTRAINT uq_jobs_tenant_idempotency_key UNIQUE (tenant, idempotency_key)
);
INSERT INTO "jobs" VALUES(1,'job_old','old search','default','succeeded','budget used','{"name": "old search", "dataset": {"source": "digits", "options": {}}, "tasks": ["left_parity", {"name": "left_loop", "weight": 0.5}], "objectives": [{"metric": "delta_m", "direction": "maximize"}, {"metric": "macs", "direction": "minimize"}], "constraints": [], "search": {"families": ["shared"], "backbones": [], "space": {}, "sampler": {"name": "tpe"}, "scheduler": {"name": "none", "eta": 3, "grace_epochs": 1}}, "budget": {"trials": 2, "epochs": 1, "seconds": null, "device_seconds": null, "failures": 5, "concurrent": null}, "resources": {"cpus": 1.0, "gpus": 0.0}, "confirm": {"top": 0, "seeds": 3}, "seed": 0, "priority": 0}','{"delta_m": "maximize", "macs": "minimize", "task.left_parity.error": "minimize", "task.left_loop.error": "minimize"}',0,1,NULL,NULL,NULL,NULL,2.5,'{"delta_m": -100.0, "macs": 5000.0}','2026-01-02 03:04:05.678901','2026-01-02 03:04:06.678901','2026-01-02 03:04:09.678901');
INSERT INTO "jobs" VALUES(2,'job_waiting','old search','default','queued',NULL,'{"name": "old search", "dataset": {"source": "digits", "options": {}}, "tasks": ["left_parity", {"name": "left_loop", "weight": 0.5}], "objectives": [{"metric": "delta_m", "direction": "maximize"}, {"metric": "macs", "direction": "minimize"}], "constraints": [], "search": {"families": ["shared"], "backbones": [], "space": {}, "sampler": {"name": "tpe"}, "scheduler": {"name": "none", "eta": 3, "grace_epochs": 1}}, "budget": {"trials": 2, "epochs": 1, "seconds": null, "device_seconds": null, "failures": 5, "concurrent": null}, "resources": {"cpus": 1.0, "gpus": 0.0}, "confirm": {"top": 0, "seeds": 3}, "seed": 0, "priority": 0}','{"delta_m": "maximize", "macs": "minimize", "task.left_parity.error": "minimize", "task.left_loop.error": "minimize"}',0,0,NULL,NULL,NULL,NULL,NULL,NULL,'2026-01-02 03:04:07.678901',NULL,NULL);
CREATE TABLE measurements (
	trial_id VARCHAR(100) NOT NULL, 
	epoch INTEGER NOT NULL, 
	"values" JSON NOT NULL, 
	tasks JSON NOT NULL, 
	device_seconds DOUBLE NOT NULL, 
	worker TEXT NOT NULL, 
	at DATETIME NOT NULL, 
	CONSTRAINT pk_measurements PRIMARY KEY (trial_id, epoch), 
	CONSTRAINT fk_measurements_trial_id_trials FOREIGN KEY(trial_id) REFERENCES trials (id) ON DELETE CASCADE
);
INSERT INTO "measurements" VALUES('trial_done',1,'{"total_error": 0.5}','{"left_parity": {"error": 0.125}}',4.5,'host:2','2026-01-02 03:04:08.678901');
CREATE TABLE reference_networks (
	position INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	data TEXT NOT NULL, 
	task TEXT NOT NULL, 
	backbone TEXT NOT NULL, 
	recipe TEXT NOT NULL, 
	epochs INTEGER NOT NULL, 
	seed BIGINT NOT NULL, 
	validation JSON NOT NULL, 
	test JSON NOT NULL, 
	device_seconds DOUBLE NOT NULL, 
	latency_ms DOUBLE NOT NULL, 
	at DATETIME NOT NULL, 
	CONSTRAINT uq_reference_networks_data_task_backbone_recipe_epochs_seed UNIQUE (data, task, backbone, recipe, epochs, seed)
);
INSERT INTO "reference_networks" VALUES(1,'digits-1','left_parity','{"name":"mlp"}','{"lr":0.005}',1,9223372036854775807,'{"error": 0.25}','{"error": 0.5}',1.5,0.25,'2026-01-02 03:04:06.678901');
CREATE TABLE trials (
	position INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(100) NOT NULL, 
	job_id VARCHAR(64) NOT NULL, 
	number INTEGER NOT NULL, 
	state VARCHAR(20) NOT NULL, 
	reason TEXT, 
	family VARCHAR(100) NOT NULL, 
	backbone VARCHAR(100) NOT NULL, 
	parameters JSON NOT NULL, 
	choices JSON NOT NULL, 
	seed BIGINT NOT NULL, 
	grouping JSON, 
	"values" JSON NOT NULL, 
	test JSON NOT NULL, 
	tasks JSON NOT NULL, 
	epochs INTEGER NOT NULL, 
	device_seconds DOUBLE NOT NULL, 
	crashes INTEGER NOT NULL, 
	worker TEXT, 
	on_front BOOLEAN NOT NULL, 
	files JSON NOT NULL, 
	attempt INTEGER, 
	started_at DATETIME, 
	ended_at DATETIME, 
	CONSTRAINT fk_trials_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE, 
	CONSTRAINT uq_trials_id UNIQUE (id), 
	CONSTRAINT uq_trials_job_id_number UNIQUE (job_id, number)
);
INSERT INTO "trials" VALUES(1,'trial_done','job_old',0,'completed',NULL,'shared','mlp','{"lr": 0.005, "width": 24}','{"family": "shared"}',9223372036854775807,NULL,'{"delta_m": 1.5, "macs": 100.0, "latency_ms": null}','{"delta_m": 1.25}','{"left_parity": {"validation": {"error": 0.125}, "test": {"error": 0.25}}}',1,4.5,1,'host:2',TRUE,'{"weights.safetensors": {"size": 10, "sha256": "abababababababababababababababababababababababababababababababab"}}',1,'2026-01-02 03:04:07.678901','2026-01-02 03:04:08.678901');
INSERT INTO "trials" VALUES(2,'trial_failed','job_old',1,'failed','out of memory','shared','mlp','{"lr": 0.01, "width": 48}','{"family": "shared"}',7,NULL,'{}','{}','{}',0,0.5,0,NULL,FALSE,'{}',1,'2026-01-02 03:04:08.678901','2026-01-02 03:04:09.678901');
CREATE INDEX ix_jobs_name ON jobs (name);
CREATE INDEX ix_jobs_state_priority_position ON jobs (state, priority, position);
CREATE INDEX ix_trials_job_id_state_number ON trials (job_id, state, number);
COMMIT;
