//! Which version this is.

use std::ffi::{CStr, c_char};

const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(version) => version,
    Err(_) => panic!("a version has no NUL"),
};

const fn number(text: &str) -> u32 {
    let (mut value, mut at) = (0, 0);
    while at < text.len() {
        value = value * 10 + (text.as_bytes()[at] - b'0') as u32;
        at += 1;
    }
    value
}

const NUMBER: u32 = number(env!("CARGO_PKG_VERSION_MAJOR")) * 1_000_000
    + number(env!("CARGO_PKG_VERSION_MINOR")) * 1_000
    + number(env!("CARGO_PKG_VERSION_PATCH"));

/// The version of the library that runs, such as "0.1.0". Compare `LEASE_VERSION`, that of this header. Never freed.
#[unsafe(no_mangle)]
pub extern "C" fn lease_version() -> *const c_char {
    VERSION.as_ptr()
}

/// The same as a number: major * 1000000 + minor * 1000 + patch. Compare `LEASE_VERSION_NUMBER`: a library that is older than the
/// header lacks what was added since.
#[unsafe(no_mangle)]
pub extern "C" fn lease_version_number() -> u32 {
    NUMBER
}
