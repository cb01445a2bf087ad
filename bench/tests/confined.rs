//! Tests of `db_bench` in the environment of a container.

use std::process::Command;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn db_bench_works_in_any_surroundings() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("bench.img");
    for (name, confinement) in pumice_confine::surroundings(dir.path()) {
        let device = format!("--device=file://{}?size=512M&create=1", image.display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_db_bench"));
        command.args([
            &device,
            "--benchmarks=fillrandom,readrandom",
            "--num=300000",
            "--reads=20000",
            "--write_buffer_size=8388608",
            "--compression_type=none",
        ]);
        let output = match confinement.run(&mut command, PATIENCE) {
            Ok(output) => output,
            Err(reason) => {
                println!("skipped: db_bench with {name}: {reason}");
                continue;
            }
        };
        let said = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && said.contains("fillrandom") && said.contains("readrandom"),
            "{name}: {}\n{said}{errors}",
            output.status
        );
        std::fs::remove_file(&image).unwrap();
    }
}
