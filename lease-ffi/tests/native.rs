//! Builds the programs under `tests/c` and `tests/cpp` against the library, and runs them. Takes a C and a C++ compiler.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Where cargo put `liblease.so`, which it builds before this test.
fn libraries() -> PathBuf {
    let test = env::current_exe().expect("a test knows where it is");
    test.ancestors().nth(2).expect("tests are in target/…/deps").to_owned()
}

fn cc() -> String {
    env::var("CC").unwrap_or_else(|_| "cc".into())
}

fn cxx() -> String {
    env::var("CXX").unwrap_or_else(|_| "c++".into())
}

fn succeeded(what: &str, output: &Output) {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{what}: {}\n{out}\n{err}", output.status);
}

/// Builds a program of `tests/` and runs it to its end.
fn run(compiler: &str, standard: &str, source: &str) {
    let program =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{standard}", source.replace(['/', '.'], "-")));
    let library = libraries();
    let mut cc = Command::new(compiler);
    cc.arg(format!("-std={standard}")).args(["-g", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-pthread"]);
    cc.arg("-I").arg(root().join("include")).arg(root().join("tests").join(source)).arg("-o").arg(&program);
    cc.arg("-L").arg(&library).arg("-llease").arg(format!("-Wl,-rpath,{}", library.display()));
    succeeded(source, &cc.output().unwrap_or_else(|error| panic!("{compiler} is needed: {error}")));
    let output = Command::new("timeout").arg("120").arg(&program).output().expect("it can be run");
    succeeded(source, &output);
    assert!(String::from_utf8_lossy(&output.stdout).ends_with("ok\n"), "{source} did not come to its end");
}

#[test]
fn every_function_does_what_the_header_says() {
    run(&cc(), "c11", "c/surface.c");
}

#[test]
fn the_classes_do_what_they_say_in_both_standards() {
    for standard in ["c++17", "c++20"] {
        run(&cxx(), standard, "cpp/surface.cpp");
    }
}

#[test]
fn the_header_is_clean_in_every_standard() {
    for (language, standards) in [("c", &["c99", "c11", "c17"][..]), ("c++", &["c++17"])] {
        for standard in standards {
            let mut cc = Command::new(cc());
            cc.args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-x", language]);
            cc.arg(format!("-std={standard}")).arg("-I").arg(root().join("include"));
            cc.arg(root().join("tests/c/header.c"));
            succeeded(standard, &cc.output().expect("there is a C compiler"));
        }
    }
}

/// Nothing of another name leaves the library: not the database that is built in, which a program may have too.
#[test]
fn only_our_names_are_exported() {
    let output = Command::new("nm").args(["-D", "--defined-only"]).arg(libraries().join("liblease.so")).output();
    let output = output.expect("nm comes with the C compiler");
    succeeded("nm", &output);
    let symbols = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut names: Vec<_> = symbols.lines().filter_map(|line| line.split(' ').nth(2)).collect();
    names.sort_unstable();
    let committed = include_str!("exports.txt");
    assert_eq!(names, committed.lines().collect::<Vec<_>>(), "compare tests/exports.txt: names are only ever added");
    let header = include_str!("../../include/lease.h");
    for name in names {
        assert!(header.contains(&format!("{name}(")), "{name} is not in the header");
    }
}
