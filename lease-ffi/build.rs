//! How the shared library is linked: its SONAME, and that it is never unloaded.

use std::env;

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
}
