//! Which version this is.

use std::ffi::{CStr, c_char};

use lease_core::{Error, ErrorKind};

use crate::error::{lease_error_t, lease_status};
use crate::handle::export;

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

/// The same as a number: major * 1000000 + minor * 1000 + patch.
#[unsafe(no_mangle)]
pub extern "C" fn lease_version_number() -> u32 {
    NUMBER
}

/// Whether a program that was compiled with the header of that version can run with this library. Call it first, as
/// `lease_version_check(LEASE_VERSION_NUMBER, &error)`: the header and the library may come from two installations.
///
/// Errors: UNSUPPORTED when the header is newer than the library, or of a version that breaks compiled programs: below 1.0
/// another minor version, from then on another major one.
#[unsafe(no_mangle)]
pub extern "C" fn lease_version_check(header: u32, err: *mut *mut lease_error_t) -> lease_status {
    export(err, || check(header))
}

fn check(header: u32) -> lease_core::Result<()> {
    let compatible = |number: u32| if number < 1_000_000 { number / 1_000 } else { number / 1_000_000 * 1_000 };
    if header <= NUMBER && compatible(header) == compatible(NUMBER) {
        return Ok(());
    }
    let (major, minor, patch) = (header / 1_000_000, header / 1_000 % 1_000, header % 1_000);
    let library = env!("CARGO_PKG_VERSION");
    let message = format!(
        "argument header is {major}.{minor}.{patch}, and the library that runs is {library}: compile with the lease.h of \
         the library that is installed, or install liblease {major}.{minor}.{patch}"
    );
    Err(Error::new(ErrorKind::Unsupported, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_runs_with_a_later_library_that_breaks_nothing() {
        assert!(check(NUMBER).is_ok());
        for other in [NUMBER + 1, NUMBER + 1_000, NUMBER + 1_000_000, 0] {
            let error = check(other).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains("compile with the lease.h"), "{error}");
        }
    }
}
