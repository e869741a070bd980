//! Whether `include/lease.h` is what the code says. `BLESS=1 cargo test -p lease-ffi --test header` writes it anew.

use std::path::Path;
use std::{env, fs};

#[test]
fn the_header_is_fresh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml can be read");
    // Parsed from the sources alone: what cargo would expand is not needed.
    let nouns = ["version", "error", "options", "manager", "lease", "pending", "record", "watch", "fence", "log"];
    let builder = nouns.iter().fold(cbindgen::Builder::new().with_config(config), |builder, noun| {
        builder.with_src(root.join(format!("src/{noun}.rs")))
    });
    let mut generated = Vec::new();
    builder.generate().expect("the sources can be read").write(&mut generated);
    let generated = String::from_utf8(generated).expect("the header is UTF-8");

    let path = root.join("../include/lease.h");
    if env::var_os("BLESS").is_some() {
        fs::write(&path, &generated).expect("the header can be written");
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == generated, "include/lease.h is stale: run BLESS=1 cargo test -p lease-ffi --test header");
}

#[test]
fn the_version_of_the_header_is_that_of_the_library() {
    let header = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../include/lease.h")).unwrap();
    for (what, is) in [
        ("MAJOR", env!("CARGO_PKG_VERSION_MAJOR").to_owned()),
        ("MINOR", env!("CARGO_PKG_VERSION_MINOR").to_owned()),
        ("PATCH", env!("CARGO_PKG_VERSION_PATCH").to_owned()),
    ] {
        assert!(header.contains(&format!("#define LEASE_VERSION_{what} {is}\n")), "LEASE_VERSION_{what} is not {is}");
    }
    assert!(header.contains(&format!("#define LEASE_VERSION \"{}\"\n", env!("CARGO_PKG_VERSION"))));
}
