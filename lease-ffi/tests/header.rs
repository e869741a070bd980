//! Whether `include/lease.h` is what the code says, and still has all that programs were compiled with.
//! `make header` writes it anew, and adds to `abi.txt` what is new.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn is_blessed() -> bool {
    env::var_os("BLESS").is_some()
}

fn generated() -> String {
    let package = root().join("lease-ffi");
    let mut config = cbindgen::Config::from_file(package.join("cbindgen.toml")).expect("cbindgen.toml can be read");
    config.after_includes = config.after_includes.map(|text| {
        text.replace("@MAJOR@", env!("CARGO_PKG_VERSION_MAJOR"))
            .replace("@MINOR@", env!("CARGO_PKG_VERSION_MINOR"))
            .replace("@PATCH@", env!("CARGO_PKG_VERSION_PATCH"))
            .replace("@VERSION@", env!("CARGO_PKG_VERSION"))
    });
    // Parsed from the sources alone: what cargo would expand is not needed.
    let nouns = ["version", "error", "options", "manager", "lease", "pending", "record", "watch", "fence", "log"];
    let builder = nouns.iter().fold(cbindgen::Builder::new().with_config(config), |builder, noun| {
        builder.with_src(package.join(format!("src/{noun}.rs")))
    });
    let mut header = Vec::new();
    builder.generate().expect("the sources can be read").write(&mut header);
    String::from_utf8(header).expect("the header is UTF-8")
}

/// What a compiled program relies on, a line each: functions, types and numbers.
fn declarations(header: &str) -> BTreeSet<String> {
    let mut code = String::new();
    for part in header.split("/*") {
        code += part.split_once("*/").map_or(part, |(_, code)| code);
    }
    let (numbers, rest): (Vec<_>, Vec<_>) = code.lines().partition(|line| line.starts_with('#'));
    let numbers = numbers.into_iter().filter(|line| line.starts_with("#define LEASE_") && !line.contains("_VERSION"));
    let rest = rest.join(" ");
    let rest = rest.split([';', '{', '}']).map(|one| one.split_whitespace().collect::<Vec<_>>().join(" "));
    let is_declaration = |text: &String| text.contains("lease_");
    numbers.filter(|line| *line != "#define LEASE_H").map(str::to_owned).chain(rest.filter(is_declaration)).collect()
}

#[test]
fn the_header_is_fresh() {
    let (path, generated) = (root().join("include/lease.h"), generated());
    if is_blessed() {
        fs::write(&path, &generated).expect("the header can be written");
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == generated, "include/lease.h is stale: run make header");
}

#[test]
fn what_programs_were_compiled_with_is_still_there() {
    let path = root().join("lease-ffi/tests/abi.txt");
    let committed = fs::read_to_string(&path).unwrap_or_default();
    let was: BTreeSet<String> = committed.lines().map(str::to_owned).collect();
    let is = declarations(&generated());
    let gone: Vec<_> = was.difference(&is).collect();
    assert!(gone.is_empty(), "compiled programs rely on these: {gone:#?}");
    if is_blessed() {
        let lines: Vec<_> = is.iter().map(String::as_str).collect();
        fs::write(&path, lines.join("\n") + "\n").expect("abi.txt can be written");
    } else {
        let new: Vec<_> = is.difference(&was).collect();
        assert!(new.is_empty(), "new; if they are to stay for ever, run make header: {new:#?}");
    }
}
