//! The messages of etcd are generated, committed, and fresh: a build takes neither protoc nor its includes.

use std::path::Path;

/// Writes them anew when `BLESS` is set.
#[test]
fn the_messages_are_those_of_the_proto() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let committed = root.join("src/stores/etcd/proto.rs");
    let out = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let files = protox::compile(["etcd.proto"], [root.join("proto")]).unwrap();
    prost_build::Config::new()
        .skip_debug(["AuthenticateRequest", "AuthenticateResponse"])
        .out_dir(out)
        .compile_fds(files)
        .unwrap();
    let head = "//! Generated from `proto/etcd.proto` by `make proto`: not to be edited.\n\n";
    let fresh = head.to_owned() + &std::fs::read_to_string(out.join("etcdserverpb.rs")).unwrap();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&committed, &fresh).unwrap();
    }
    assert!(std::fs::read_to_string(&committed).unwrap() == fresh, "stale: run `make proto`");
}
