//! The manager and its verbs.

use std::ffi::c_char;
use std::future::IntoFuture;
use std::ptr;
use std::sync::Arc;

use lease_core::{Acquire, Manager, Name, Result};

use crate::error::{cancelled, lease_error_t, lease_status};
use crate::handle::{export, find, insert, invalid, remove, text, timeout, value};
use crate::lease::{Held, lease_t};
use crate::options::{Set, lease_options_t, options};
use crate::record::{lease_record_t, lease_records_t, record, records};
use crate::wait::{Waited, block_on, wait};

/// A manager of leases on one store. Close it with `lease_manager_close`, free it with `lease_manager_free`.
pub struct lease_manager_t {
    _private: [u8; 0],
}

pub(crate) fn manager(m: *const lease_manager_t) -> Result<Arc<Manager>> {
    find(m.cast(), "m", "lease_manager_t")
}

/// Opens a manager on the store of a URL (see Stores above). A NULL `url` means the variable LEASE_URL. `opts` may be NULL; options
/// beat those of the URL, which beat the variables LEASE_TTL, LEASE_OWNER and LEASE_REQUEST_TIMEOUT. A store that does not answer
/// is no error before the first call that needs it. `*out` is freed with `lease_manager_free`.
///
/// Errors: INVALID for a wrong URL, option or LEASE_... variable, DENIED for a path that cannot be written, INCOMPATIBLE for another
/// program's file, UNSUPPORTED for a store this build lacks, UNAVAILABLE when the system cannot make the file, LIMIT.
#[unsafe(no_mangle)]
pub extern "C" fn lease_manager_open(
    url: *const c_char,
    opts: *const lease_options_t,
    out: *mut *mut lease_manager_t,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let out = crate::handle::out(out)?;
        let set = options(opts)?;
        if set.cancel().is_some() {
            return Err(invalid("opts", "has a cancel fd, which is for an acquire: opening does not wait"));
        }
        let mut builder = Manager::builder();
        if !url.is_null() {
            builder = builder.url(text(url, "url")?);
        }
        for (key, value) in set.texts {
            builder = builder.option(key, value);
        }
        let handle = insert(Arc::new(block_on(builder.open())?))?;
        out.put(handle);
        Ok(())
    })
}

/// An acquire that is ready to start, and the options it came with.
pub(crate) fn prepare(
    m: *const lease_manager_t,
    name: *const c_char,
    timeout_ms: i64,
    opts: *const lease_options_t,
) -> Result<(Acquire, Name, Set)> {
    let manager = manager(m)?;
    let name = Name::new(text(name, "name")?).map_err(|error| error.during("acquire", None))?;
    let mut acquire = manager.acquire(&*name);
    let set = options(opts)?;
    for (key, value) in &set.texts {
        if key == "timeout" {
            return Err(invalid("opts", "sets \"timeout\": the argument timeout_ms says it"));
        }
        acquire = acquire.option(key, value)?;
    }
    Ok((acquire.timeout(timeout(timeout_ms)?), name, set))
}

/// Waits until the name is yours, and gives a lease in `*out`, to be freed with `lease_free`. `timeout_ms` is how long to wait:
/// `LEASE_WAIT_FOREVER`, or `LEASE_TRY_ONCE` for one attempt (which takes at most the request timeout). `opts` may be NULL, and may
/// set "ttl" and "owner" for this lease, and a cancel fd. Signals do not end the wait: use a cancel fd. When it fails, nothing is
/// held, and what waited leaves the line in the background. A lease is not re-entrant: a name that you hold is waited for like anybody's.
///
/// Errors: TIMEOUT when the time was up, with the holder if it is known; UNAVAILABLE if the store did not answer until then;
/// CANCELLED by the cancel fd; CLOSED; DENIED, INCOMPATIBLE or UNSUPPORTED by the store; INVALID; LIMIT.
#[unsafe(no_mangle)]
pub extern "C" fn lease_manager_acquire(
    m: *mut lease_manager_t,
    name: *const c_char,
    timeout_ms: i64,
    opts: *const lease_options_t,
    out: *mut *mut lease_t,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let out = crate::handle::out(out)?;
        let (acquire, name, set) = prepare(m, name, timeout_ms, opts)?;
        let mut acquiring = acquire.into_future();
        let lease = match wait(acquiring.as_mut(), None, set.cancel())? {
            Waited::Done(acquired) => acquired?,
            Waited::Cancelled | Waited::TimedOut => return Err(cancelled(&name)),
        };
        let handle = Held::insert(lease)?;
        out.put(handle);
        Ok(())
    })
}

/// Who holds the name: `*out` becomes a record, to be freed with `lease_record_free`, or NULL when it is free.
///
/// Errors: UNAVAILABLE, DENIED, INCOMPATIBLE, UNSUPPORTED, CLOSED, INVALID.
#[unsafe(no_mangle)]
pub extern "C" fn lease_manager_inspect(
    m: *mut lease_manager_t,
    name: *const c_char,
    out: *mut *mut lease_record_t,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let out = crate::handle::out(out)?;
        let found = block_on(manager(m)?.inspect(text(name, "name")?))?;
        let handle = found.map_or(Ok(ptr::null_mut()), record)?;
        out.put(handle);
        Ok(())
    })
}

/// Everything held whose name begins with the prefix, sorted by name; "" lists all. Free `*out` with `lease_records_free`.
///
/// Errors: as `lease_manager_inspect`.
#[unsafe(no_mangle)]
pub extern "C" fn lease_manager_list(
    m: *mut lease_manager_t,
    prefix: *const c_char,
    out: *mut *mut lease_records_t,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let out = crate::handle::out(out)?;
        let found = block_on(manager(m)?.list(text(prefix, "prefix")?))?;
        let handle = records(found)?;
        out.put(handle);
        Ok(())
    })
}

/// Takes the lease, or the waiting claim, with that token away, for operators. Its holder is told when it renews, at the latest after
/// half its ttl: until then it may overlap its successor, and only the token protects.
///
/// Errors: NOT_FOUND when no claim of that token is there, and as `lease_manager_inspect`. UNAVAILABLE is in doubt.
#[unsafe(no_mangle)]
pub extern "C" fn lease_manager_break(
    m: *mut lease_manager_t,
    name: *const c_char,
    token: i64,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let (manager, name) = (manager(m)?, text(name, "name")?);
        block_on(manager.break_lease(name, crate::handle::token(token)?))
    })
}

/// Whether the store answers, within the request timeout.
///
/// Errors: as `lease_manager_inspect`.
#[unsafe(no_mangle)]
pub extern "C" fn lease_manager_ping(m: *mut lease_manager_t, err: *mut *mut lease_error_t) -> lease_status {
    export(err, || block_on(manager(m)?.ping()))
}

/// Ends every wait with CLOSED, releases every lease, waits for callbacks that run, and leaves no thread and no claim behind. Finish
/// the work first. Takes at most 5 s; harmless when repeated. Handles stay until they are freed: the manager's, and those of its
/// leases, which say LEASE_END_CLOSED.
///
/// Errors: UNAVAILABLE, in doubt, if the store could not be told of every release: what it is not told of expires. Repeating the call
/// then says OK and tells nothing more.
#[unsafe(no_mangle)]
pub extern "C" fn lease_manager_close(m: *mut lease_manager_t, err: *mut *mut lease_error_t) -> lease_status {
    export(err, || block_on(manager(m)?.close()))
}

/// Frees the handle. A manager that was not closed is closed in the background once its last lease, pending acquire and watch is
/// freed; leases stay held until then. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn lease_manager_free(m: *mut lease_manager_t) {
    value((), || {
        remove::<Manager>(m.cast());
        None
    });
}
