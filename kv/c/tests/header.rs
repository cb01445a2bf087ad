//! The header that is checked in is what cbindgen makes of the sources.

use std::path::Path;

/// Set this to write the header instead.
const BLESS: &str = "PUMICE_BLESS_HEADER";

#[test]
fn the_header_is_that_of_the_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let mut builder = cbindgen::Builder::new().with_config(config);
    for module in ["header", "error", "options", "store", "file", "env"] {
        builder = builder.with_src(root.join("src").join(module).with_extension("rs"));
    }
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    let made = String::from_utf8(made).unwrap();
    let path = root.join("include/pumice.h");
    if std::env::var_os(BLESS).is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == made,
        "{} is not what cbindgen makes of src/: run `{BLESS}=1 cargo test -p pumice-c --test header`, and raise \
         PUMICE_HEADER_VERSION if a function, a struct or a constant has changed",
        path.display()
    );
}
