-- A database of schema 0002, as SQLite's .dump writes it but for the booleans, which PostgreSQL reads too.
BEGIN TRANSACTION;
CREATE TABLE affinities (
	position INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	job_id VARCHAR(64), 
	data TEXT NOT NULL, 
	backbone TEXT NOT NULL, 
	recipe TEXT NOT NULL, 
	epochs INTEGER NOT NULL, 
	method VARCHAR(100) NOT NULL, 
	tasks TEXT NOT NULL, 
	seed BIGINT NOT NULL, 
	matrix JSON NOT NULL, 
	at DATETIME NOT NULL, 
	CONSTRAINT fk_affinities_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE SET NULL, 
	CONSTRAINT uq_affinities_data_backbone_recipe_epochs_method_tasks_seed UNIQUE (data, backbone, recipe, epochs, method, tasks, seed)
);
INSERT INTO "affinities" VALUES(1,'job_done','digits-2','["mlp", {"depth": 2}]','{"lr": 0.005}',2,'one_step','[["left_parity",1.0],["left_loop",0.5]]',0,'[[null, 0.25], [-0.5, null]]','2026-02-03 04:05:18.789012');
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0002');
CREATE TABLE attempts (
	job_id VARCHAR(64) NOT NULL, 
	attempt INTEGER NOT NULL, 
	driver TEXT, 
	reason TEXT, 
	preempted BOOLEAN NOT NULL, 
	started_at DATETIME NOT NULL, 
	last_seen_at DATETIME NOT NULL, 
	ended_at DATETIME, 
	side_device_seconds DOUBLE NOT NULL, 
	CONSTRAINT pk_attempts PRIMARY KEY (job_id, attempt), 
	CONSTRAINT fk_attempts_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
INSERT INTO "attempts" VALUES('job_done',1,'host:1',NULL,FALSE,'2026-02-03 04:05:09.789012','2026-02-03 04:05:55.789012','2026-02-03 04:05:54.789012',10.5);
INSERT INTO "attempts" VALUES('job_waiting',1,'host:1','its driver is gone',FALSE,'2026-02-03 04:05:58.789012','2026-02-03 04:06:04.789012','2026-02-03 04:06:05.789012',0.5);
INSERT INTO "attempts" VALUES('job_waiting',2,'host:1','paused',TRUE,'2026-02-03 04:06:07.789012','2026-02-03 04:06:12.789012','2026-02-03 04:06:13.789012',0.0);
INSERT INTO "attempts" VALUES('job_cancelled',1,'host:1',NULL,FALSE,'2026-02-03 04:06:17.789012','2026-02-03 04:06:19.789012','2026-02-03 04:06:21.789012',0.0);
CREATE TABLE confirmations (
	trial_id VARCHAR(100) NOT NULL, 
	role VARCHAR(20) NOT NULL, 
	seed BIGINT NOT NULL, 
	sequence INTEGER NOT NULL, 
	job_id VARCHAR(64) NOT NULL, 
	state VARCHAR(20) NOT NULL, 
	reason TEXT, 
	family VARCHAR(100) NOT NULL, 
	backbone VARCHAR(100) NOT NULL, 
	parameters JSON NOT NULL, 
	grouping JSON, 
	"values" JSON NOT NULL, 
	test JSON NOT NULL, 
	tasks JSON NOT NULL, 
	epochs INTEGER NOT NULL, 
	device_seconds DOUBLE NOT NULL, 
	at DATETIME NOT NULL, 
	CONSTRAINT pk_confirmations PRIMARY KEY (trial_id, role, seed), 
	CONSTRAINT fk_confirmations_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE, 
	CONSTRAINT fk_confirmations_trial_id_trials FOREIGN KEY(trial_id) REFERENCES trials (id) ON DELETE CASCADE
);
INSERT INTO "confirmations" VALUES('trial_done_1','point',5,1,'job_done','completed',NULL,'dmtg','mlp','{"lr": 0.005, "groups": 2}',NULL,'{"delta_m": 1.25, "macs": 90.0, "params": 45.0, "latency_ms": null}','{}','{}',2,3.0,'2026-02-03 04:05:52.789012');
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
INSERT INTO "front_history" VALUES('job_done',1,'trial_done_0',490000.0,1,'2026-02-03 04:05:42.789012');
INSERT INTO "front_history" VALUES('job_done',2,'trial_done_1',498000.0,1,'2026-02-03 04:05:46.789012');
CREATE TABLE job_references (
	job_id VARCHAR(64) NOT NULL, 
	reference INTEGER NOT NULL, 
	CONSTRAINT pk_job_references PRIMARY KEY (job_id, reference), 
	CONSTRAINT fk_job_references_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE, 
	CONSTRAINT fk_job_references_reference_reference_networks FOREIGN KEY(reference) REFERENCES reference_networks (position) ON DELETE CASCADE
);
INSERT INTO "job_references" VALUES('job_done',1);
INSERT INTO "job_references" VALUES('job_done',2);
INSERT INTO "job_references" VALUES('job_waiting',1);
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
	ended_at DATETIME, memory_until BIGINT, side_setting JSON, verdict JSON, eta_seconds DOUBLE, eta_at DATETIME, 
	CONSTRAINT uq_jobs_id UNIQUE (id), 
	CONSTRAINT uq_jobs_tenant_idempotency_key UNIQUE (tenant, idempotency_key)
);
INSERT INTO "jobs" VALUES(1,'job_done','second search','default','succeeded','budget used','{"name": "second search", "dataset": {"source": "digits", "options": {}}, "tasks": ["left_parity", {"name": "left_loop", "weight": 0.5}], "objectives": [{"metric": "delta_m", "direction": "maximize"}, {"metric": "macs", "direction": "minimize"}], "constraints": [], "search": {"families": ["single", "shared", "grouped", "dmtg", "interrogate", "etr_nlp", "affinity", "dmtg+interrogate"], "backbones": [], "space": {}, "sampler": {"name": "coterie"}, "scheduler": {"name": "none", "eta": 3, "grace_epochs": 1, "metric": null}, "repeats": false}, "budget": {"trials": 3, "epochs": 20, "seconds": null, "device_seconds": null, "failures": 5, "concurrent": null, "stop_when": null}, "resources": {"cpus": 1.0, "gpus": 0.0}, "confirm": {"top": 0, "seeds": 3}, "seed": 0, "priority": 2}','{"delta_m": "maximize", "macs": "minimize", "task.left_parity.error": "minimize", "task.left_loop.error": "minimize"}',2,1,NULL,'job_done-1','a key','abababababababababababababababababababababababababababababababab',498000.0,'{"delta_m": -100.0, "macs": 5000.0}','2026-02-03 04:05:07.789012','2026-02-03 04:05:08.789012','2026-02-03 04:05:54.789012',0,'{"data": "digits-2", "backbone": "[\"mlp\", {\"depth\": 2}]", "recipe": "{\"lr\": 0.005}", "epochs": 2}','{"kind": "groups", "words": "In two groups.", "trial_id": "trial_done_1", "grouping": [["left_parity"], ["left_loop"]]}',NULL,NULL);
INSERT INTO "jobs" VALUES(2,'job_waiting','second search','default','queued',NULL,'{"name": "second search", "dataset": {"source": "digits", "options": {}}, "tasks": ["left_parity", {"name": "left_loop", "weight": 0.5}], "objectives": [{"metric": "delta_m", "direction": "maximize"}, {"metric": "macs", "direction": "minimize"}], "constraints": [], "search": {"families": ["single", "shared", "grouped", "dmtg", "interrogate", "etr_nlp", "affinity", "dmtg+interrogate"], "backbones": [], "space": {}, "sampler": {"name": "coterie"}, "scheduler": {"name": "none", "eta": 3, "grace_epochs": 1, "metric": null}, "repeats": false}, "budget": {"trials": 3, "epochs": 20, "seconds": null, "device_seconds": null, "failures": 5, "concurrent": null, "stop_when": null}, "resources": {"cpus": 1.0, "gpus": 0.0}, "confirm": {"top": 0, "seeds": 3}, "seed": 0, "priority": 2}','{"delta_m": "maximize", "macs": "minimize", "task.left_parity.error": "minimize", "task.left_loop.error": "minimize"}',2,2,NULL,'job_waiting-2',NULL,NULL,NULL,NULL,'2026-02-03 04:05:56.789012','2026-02-03 04:05:57.789012',NULL,1,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(3,'job_cancelled','second search','default','cancelled',NULL,'{"name": "second search", "dataset": {"source": "digits", "options": {}}, "tasks": ["left_parity", {"name": "left_loop", "weight": 0.5}], "objectives": [{"metric": "delta_m", "direction": "maximize"}, {"metric": "macs", "direction": "minimize"}], "constraints": [], "search": {"families": ["single", "shared", "grouped", "dmtg", "interrogate", "etr_nlp", "affinity", "dmtg+interrogate"], "backbones": [], "space": {}, "sampler": {"name": "coterie"}, "scheduler": {"name": "none", "eta": 3, "grace_epochs": 1, "metric": null}, "repeats": false}, "budget": {"trials": 3, "epochs": 20, "seconds": null, "device_seconds": null, "failures": 5, "concurrent": null, "stop_when": null}, "resources": {"cpus": 1.0, "gpus": 0.0}, "confirm": {"top": 0, "seeds": 3}, "seed": 0, "priority": 2}','{"delta_m": "maximize", "macs": "minimize", "task.left_parity.error": "minimize", "task.left_loop.error": "minimize"}',2,1,NULL,'job_cancelled-1',NULL,NULL,NULL,NULL,'2026-02-03 04:06:14.789012','2026-02-03 04:06:16.789012','2026-02-03 04:06:21.789012',1,NULL,NULL,NULL,NULL);
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
INSERT INTO "measurements" VALUES('trial_done_0',1,'{"total_error": 0.5}','{"left_parity": {"error": 0.25}}',0.5,'host:2','2026-02-03 04:05:27.789012');
INSERT INTO "measurements" VALUES('trial_done_0',2,'{"total_error": 0.25}','{"left_parity": {"error": 0.125}}',1.0,'host:2','2026-02-03 04:05:29.789012');
INSERT INTO "measurements" VALUES('trial_done_1',1,'{"total_error": 0.5}','{"left_parity": {"error": 0.25}}',0.5,'host:2','2026-02-03 04:05:32.789012');
INSERT INTO "measurements" VALUES('trial_done_1',2,'{"total_error": 0.25}','{"left_parity": {"error": 0.125}}',1.0,'host:2','2026-02-03 04:05:34.789012');
INSERT INTO "measurements" VALUES('trial_done_2',1,'{"total_error": 0.5}','{"left_parity": {"error": 0.25}}',0.5,'host:2','2026-02-03 04:05:37.789012');
INSERT INTO "measurements" VALUES('trial_done_2',2,'{"total_error": 0.25}','{"left_parity": {"error": 0.125}}',1.0,'host:2','2026-02-03 04:05:39.789012');
INSERT INTO "measurements" VALUES('trial_waiting_0',1,'{"total_error": 0.5}','{"left_parity": {"error": 0.25}}',0.5,'host:2','2026-02-03 04:06:03.789012');
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
INSERT INTO "reference_networks" VALUES(1,'digits-2','left_parity','{"name":"mlp"}','{"lr":0.005}',2,9223372036854775807,'{"error": 0.25}','{"error": 0.5}',1.5,0.25,'2026-02-03 04:05:12.789012');
INSERT INTO "reference_networks" VALUES(2,'digits-2','left_loop','{"name":"mlp"}','{"lr":0.005}',2,9223372036854775807,'{"error": 0.25}','{"error": 0.5}',1.5,0.25,'2026-02-03 04:05:14.789012');
CREATE TABLE subset_networks (
	position INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	job_id VARCHAR(64), 
	run INTEGER NOT NULL, 
	data TEXT NOT NULL, 
	backbone TEXT NOT NULL, 
	recipe TEXT NOT NULL, 
	epochs INTEGER NOT NULL, 
	subset TEXT NOT NULL, 
	seed BIGINT NOT NULL, 
	validation JSON NOT NULL, 
	test JSON NOT NULL, 
	at DATETIME NOT NULL, 
	CONSTRAINT fk_subset_networks_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE SET NULL, 
	CONSTRAINT uq_subset_networks_job_id_run_subset_seed UNIQUE (job_id, run, subset, seed)
);
INSERT INTO "subset_networks" VALUES(1,'job_done',0,'digits-2','["mlp", {"depth": 2}]','{"lr": 0.005}',2,'[["left_parity",1.0]]',0,'{"left_parity": {"error": 0.25}}','{}','2026-02-03 04:05:20.789012');
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
	ended_at DATETIME, origin VARCHAR(20) DEFAULT '' NOT NULL, 
	CONSTRAINT fk_trials_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE, 
	CONSTRAINT uq_trials_id UNIQUE (id), 
	CONSTRAINT uq_trials_job_id_number UNIQUE (job_id, number)
);
INSERT INTO "trials" VALUES(1,'trial_done_0','job_done',0,'completed',NULL,'dmtg','mlp','{"lr": 0.005, "groups": 2}','{"family": "dmtg", "dmtg.groups": 2}',9223372036854775807,'[["left_parity", "left_loop"]]','{"delta_m": 0.0, "macs": 100.0, "params": 50.0, "latency_ms": null}','{"delta_m": -0.5}','{"left_parity": {"validation": {"error": 0.125}, "test": {"error": 0.25}}}',2,4.0,0,'host:2',FALSE,'{"architecture.json": {"size": 20, "sha256": "cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd"}, "weights.safetensors": {"size": 100, "sha256": "abababababababababababababababababababababababababababababababab"}}',1,'2026-02-03 04:05:26.789012','2026-02-03 04:05:41.789012','baseline');
INSERT INTO "trials" VALUES(2,'trial_done_1','job_done',1,'completed',NULL,'dmtg','mlp','{"lr": 0.005, "groups": 2}','{"family": "dmtg", "dmtg.groups": 2}',9223372036854775806,'[["left_parity"], ["left_loop"]]','{"delta_m": 1.5, "macs": 90.0, "params": 45.0, "latency_ms": null}','{"delta_m": 1.25}','{"left_parity": {"validation": {"error": 0.125}, "test": {"error": 0.25}}}',2,4.5,1,'host:2',TRUE,'{"architecture.json": {"size": 20, "sha256": "cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd"}, "weights.safetensors": {"size": 100, "sha256": "abababababababababababababababababababababababababababababababab"}}',1,'2026-02-03 04:05:31.789012','2026-02-03 04:05:45.789012','tpe');
INSERT INTO "trials" VALUES(3,'trial_done_2','job_done',2,'stopped','its rung','dmtg','mlp','{"lr": 0.005, "groups": 2}','{"family": "dmtg", "dmtg.groups": 2}',9223372036854775805,NULL,'{"total_error": 0.25}','{}','{}',2,1.0,0,'host:2',FALSE,'{}',1,'2026-02-03 04:05:36.789012','2026-02-03 04:05:48.789012','tpe');
INSERT INTO "trials" VALUES(4,'trial_done_3','job_done',3,'failed','out of memory','dmtg','mlp','{"lr": 0.005, "groups": 2}','{"family": "dmtg", "dmtg.groups": 2}',9223372036854775804,NULL,'{}','{}','{}',0,0.25,0,NULL,FALSE,'{}',1,NULL,'2026-02-03 04:05:50.789012','tpe');
INSERT INTO "trials" VALUES(5,'trial_waiting_0','job_waiting',0,'pending',NULL,'dmtg','mlp','{"lr": 0.005, "groups": 2}','{"family": "dmtg", "dmtg.groups": 2}',9223372036854775807,NULL,'{}','{}','{}',1,0.5,0,'host:2',FALSE,'{}',NULL,'2026-02-03 04:06:02.789012',NULL,'tpe');
INSERT INTO "trials" VALUES(6,'trial_waiting_1','job_waiting',1,'pending',NULL,'dmtg','mlp','{"lr": 0.005, "groups": 2}','{"family": "dmtg", "dmtg.groups": 2}',9223372036854775806,NULL,'{}','{}','{}',0,0.0,0,NULL,FALSE,'{}',NULL,'2026-02-03 04:06:10.789012',NULL,'tpe');
INSERT INTO "trials" VALUES(7,'trial_cancelled_0','job_cancelled',0,'cancelled',NULL,'dmtg','mlp','{"lr": 0.005, "groups": 2}','{"family": "dmtg", "dmtg.groups": 2}',9223372036854775807,NULL,'{}','{}','{}',0,0.0,0,NULL,FALSE,'{}',NULL,'2026-02-03 04:06:20.789012','2026-02-03 04:06:21.789012','tpe');
CREATE INDEX ix_confirmations_job_id ON confirmations (job_id);
CREATE INDEX ix_jobs_name ON jobs (name);
CREATE INDEX ix_jobs_state_priority_position ON jobs (state, priority, position);
CREATE INDEX ix_subset_networks_data_backbone_recipe_epochs_position ON subset_networks (data, backbone, recipe, epochs, position);
CREATE INDEX ix_trials_job_id_state_number ON trials (job_id, state, number);
COMMIT;
