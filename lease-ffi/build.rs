//! How the shared library is linked: its SONAME, and that it is never unloaded.

use std::env;
use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let part = |name| env::var(format!("CARGO_PKG_VERSION_{name}")).expect("cargo says the version");
    // The part of the version that changes when compiled users break, as cargo-c has it.
    let soname = match part("MAJOR").as_str() {
        "0" => format!("liblease.so.0.{}", part("MINOR")),
        major => format!("liblease.so.{major}"),
    };
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,{soname}");
    // Threads of the library outlive dlclose.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    // So that what is linked with the library where cargo puts it also runs there.
    let out = env::var("OUT_DIR").expect("cargo says where to");
    if let Some(target) = Path::new(&out).ancestors().nth(3) {
        let link = target.join(soname);
        if !link.is_symlink() {
            std::os::unix::fs::symlink("liblease.so", &link).expect("the target directory can be written");
        }
    }
}
