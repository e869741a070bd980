//! The verbs.

use std::future::IntoFuture;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lease_core::{Acquire, Builder, Error, ErrorKind, Manager as Core, Result, TryAcquire};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use tokio::sync::oneshot;

use crate::errors::{during, raise, refuse_unknown, wrong_type, wrong_use};
use crate::interpreter::{attached, detached, unraisable};
use crate::lease::Lease;
use crate::mailbox::{Answer, Pending};
use crate::process::Own;
use crate::testing::CutStore;
use crate::values::{self, Given};
use crate::wait::wait;
use crate::watch::{BaseWatch, Watch};

/// The settings that are given to a manager.
#[derive(Clone, Default)]
struct Settings {
    url: Option<String>,
    ttl: Option<Duration>,
    timeout: Option<values::Timeout>,
    owner: Option<String>,
    request_timeout: Option<Duration>,
}

impl Settings {
    fn builder(&self) -> Builder {
        let mut builder = Core::builder();
        if let Some(url) = &self.url {
            builder = builder.url(url);
        }
        if let Some(ttl) = self.ttl {
            builder = builder.ttl(ttl);
        }
        if let Some(timeout) = self.timeout {
            builder = builder.timeout(timeout);
        }
        if let Some(owner) = &self.owner {
            builder = builder.owner(owner);
        }
        if let Some(request_timeout) = self.request_timeout {
            builder = builder.request_timeout(request_timeout);
        }
        builder
    }

    fn open(&self) -> Result<Core> {
        futures_lite::future::block_on(self.builder().open())
    }
}

#[doc = include_str!(concat!(env!("OUT_DIR"), "/BaseManager"))]
#[pyclass(frozen, subclass, weakref, module = "lease._lease")]
pub(crate) struct BaseManager {
    settings: Settings,
    /// A forked child makes its own, from the settings.
    core: RwLock<Own<Core>>,
    store: Option<Py<CutStore>>,
    closed: AtomicBool,
    entered: AtomicBool,
}

impl BaseManager {
    pub(crate) fn core(&self, py: Python<'_>, operation: &'static str) -> PyResult<Core> {
        // Locked by nobody but who has the interpreter's lock, and neither waits nor runs Python code meanwhile.
        if let Some(core) = self.core.read().expect("nothing panics here").get() {
            return Ok(core.clone());
        }
        let refuse = |kind, message: &str| Err(raise(py, &Error::new(kind, message).during(operation, None)));
        if self.closed.load(Ordering::Relaxed) {
            return refuse(ErrorKind::Closed, "the manager was closed before this process was forked: make a new one");
        }
        if self.store.is_some() {
            return refuse(ErrorKind::Forked, "its store is in the memory of the parent of this forked process");
        }
        let opened = self.settings.open().map_err(|error| raise(py, &error))?;
        *self.core.write().expect("nothing panics here") = Own::new(opened.clone());
        Ok(opened)
    }

    fn attempt(
        &self,
        py: Python<'_>,
        name: &Bound<'_, PyAny>,
        ttl: Option<&Bound<'_, PyAny>>,
        owner: Option<&Bound<'_, PyAny>>,
        unknown: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<TryAcquire> {
        during(self.prepare_attempt(py, name, ttl, owner, unknown), "try_acquire", Some(name), py)
    }

    fn prepare_attempt(
        &self,
        py: Python<'_>,
        name: &Bound<'_, PyAny>,
        ttl: Option<&Bound<'_, PyAny>>,
        owner: Option<&Bound<'_, PyAny>>,
        unknown: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<TryAcquire> {
        refuse_unknown(py, unknown, &["ttl", "owner"])?;
        let mut attempt = self.core(py, "try_acquire")?.try_acquire(values::text(name, "name")?);
        if let Some(ttl) = ttl {
            attempt = attempt.ttl(values::duration(ttl, "ttl")?);
        }
        if let Some(owner) = owner {
            attempt = attempt.owner(values::text(owner, "owner")?);
        }
        Ok(attempt)
    }

    /// What is to be closed: nothing in a forked child, whose parent has it.
    fn closing(&self) -> Option<Core> {
        self.closed.store(true, Ordering::Relaxed);
        self.core.read().expect("nothing panics here").get().cloned()
    }

    fn wait<T: Send>(py: Python<'_>, work: impl Future<Output = Result<T>> + Send) -> PyResult<T> {
        wait(py, work)?.map_err(|error| raise(py, &error))
    }

    fn acquire(&self, py: Python<'_>, asked: &Asked<'_>) -> PyResult<Acquire> {
        during(self.prepare(py, asked), "acquire", Some(asked.name), py)
    }

    fn prepare(&self, py: Python<'_>, asked: &Asked<'_>) -> PyResult<Acquire> {
        refuse_unknown(py, asked.unknown, &["ttl", "timeout", "owner", "on_wait"])?;
        let mut acquire = self.core(py, "acquire")?.acquire(values::text(asked.name, "name")?);
        if let Some(ttl) = asked.ttl {
            acquire = acquire.ttl(values::duration(ttl, "ttl")?);
        }
        if let Some(timeout) = values::timeout(&asked.timeout)? {
            acquire = acquire.timeout(timeout);
        }
        if let Some(owner) = asked.owner {
            acquire = acquire.owner(values::text(owner, "owner")?);
        }
        Ok(acquire)
    }
}

/// The arguments of an acquire.
struct Asked<'a> {
    name: &'a Bound<'a, PyAny>,
    ttl: Option<&'a Bound<'a, PyAny>>,
    timeout: Given<'a>,
    owner: Option<&'a Bound<'a, PyAny>>,
    unknown: Option<&'a Bound<'a, PyDict>>,
}

#[pymethods]
impl BaseManager {
    #[new]
    #[pyo3(signature = (url = None, *, ttl = None, timeout = Given(None), owner = None, request_timeout = None, **unknown),
           text_signature = "(url=None, *, ttl=None, timeout=..., owner=None, request_timeout=None)")]
    fn new(
        py: Python<'_>,
        url: Option<&Bound<'_, PyAny>>,
        ttl: Option<&Bound<'_, PyAny>>,
        timeout: Given<'_>,
        owner: Option<&Bound<'_, PyAny>>,
        request_timeout: Option<&Bound<'_, PyAny>>,
        unknown: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        // Of `lease.testing` alone.
        let store = unknown.map(|unknown| unknown.call_method1("pop", ("_store", py.None()))).transpose()?;
        let store = store.filter(|store| !store.is_none()).map(Bound::cast_into::<CutStore>).transpose()?;
        let store = store.map(Bound::unbind);
        let settings = || {
            refuse_unknown(py, unknown, &["ttl", "timeout", "owner", "request_timeout"])?;
            let duration =
                |value: Option<&Bound<'_, PyAny>>, what| value.map(|it| values::duration(it, what)).transpose();
            Ok(Settings {
                url: url.map(values::url).transpose()?,
                ttl: duration(ttl, "ttl")?,
                timeout: values::timeout(&timeout)?,
                owner: owner.map(|owner| values::text(owner, "owner")).transpose()?,
                request_timeout: duration(request_timeout, "request_timeout")?,
            })
        };
        let mut settings = during(settings(), "open", None, py)?;
        crate::log::subscribe(py)?;
        let mut builder = settings.builder();
        if let Some(store) = &store {
            builder = builder.store(store.get().connect(py)?);
        }
        let core =
            detached(py, || futures_lite::future::block_on(builder.open())).map_err(|error| raise(py, &error))?;
        if store.is_none() {
            // For a forked child, and wherever it is unpickled: the same file, whatever the working directory is then.
            let url = settings.url.clone().or_else(|| std::env::var("LEASE_URL").ok());
            settings.url = url.map(|url| Builder::absolute(&url)).transpose().map_err(|error| raise(py, &error))?;
        }
        let (closed, entered) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Self { settings, core: RwLock::new(Own::new(core)), store, closed, entered })
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        let (py, settings) = (slf.py(), &slf.get().settings);
        let scheme = settings.url.as_ref().and_then(|url| url.split(':').next());
        let is_memory = scheme.is_none_or(|scheme| scheme.eq_ignore_ascii_case("memory"));
        if is_memory || slf.get().store.is_some() {
            let message =
                "a manager whose store is in this process's memory cannot be pickled: use a store that others can open";
            return Err(wrong_type(py, message));
        }
        let keywords = PyDict::new(py);
        if let Some(ttl) = settings.ttl {
            keywords.set_item("ttl", ttl.as_secs_f64())?;
        }
        if let Some(timeout) = settings.timeout {
            keywords.set_item("timeout", timeout.map(|timeout| timeout.as_secs_f64()))?;
        }
        if let Some(owner) = &settings.owner {
            keywords.set_item("owner", owner)?;
        }
        if let Some(request_timeout) = settings.request_timeout {
            keywords.set_item("request_timeout", request_timeout.as_secs_f64())?;
        }
        let partial = py.import("functools")?.getattr("partial")?;
        let make = partial.call((slf.get_type(), &settings.url), Some(&keywords))?;
        Ok((make, PyTuple::empty(py)))
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let this = slf.get();
        let url = this.settings.url.as_deref().unwrap_or("memory:");
        // Of another store's URL only the scheme: the rest may have a password in it.
        let url = match url.split_once(':') {
            Some((scheme @ ("memory" | "sqlite"), rest)) => {
                format!("{scheme}:{}", rest.split('?').next().unwrap_or_default())
            }
            Some((scheme, _)) => format!("{scheme}:…"),
            None => url.into(),
        };
        let state = if this.closed.load(Ordering::Relaxed) { " closed" } else { "" };
        Ok(format!("<{} {}{state}>", slf.get_type().name()?, url.escape_debug()))
    }

    /// For the asyncio side of this package: what is asked for, and what `on_wait` is told.
    #[pyo3(name = "_acquire", signature = (name, *, ttl = None, timeout = Given(None), owner = None, on_wait = false, **unknown))]
    #[expect(clippy::too_many_arguments, reason = "keywords")]
    fn start_acquire(
        &self,
        py: Python<'_>,
        name: &Bound<'_, PyAny>,
        ttl: Option<&Bound<'_, PyAny>>,
        timeout: Given<'_>,
        owner: Option<&Bound<'_, PyAny>>,
        on_wait: bool,
        unknown: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<(Pending, Option<Pending>)> {
        let acquire = self.acquire(py, &Asked { name, ttl, timeout, owner, unknown })?;
        let (acquire, told) = if on_wait {
            let (tell, told) = oneshot::channel();
            let told = Pending::new(async move { Ok(Answer::Waiting(told.await.ok())) });
            (acquire.on_wait(move |waiting| drop(tell.send(waiting))), Some(told))
        } else {
            (acquire, None)
        };
        let acquiring = acquire.into_future();
        Ok((Pending::new(async move { acquiring.await.map(|lease| Answer::Lease(Some(lease))) }), told))
    }

    /// For the asyncio side of this package.
    #[pyo3(name = "_try_acquire", signature = (name, *, ttl = None, owner = None, **unknown))]
    fn start_try_acquire(
        &self,
        py: Python<'_>,
        name: &Bound<'_, PyAny>,
        ttl: Option<&Bound<'_, PyAny>>,
        owner: Option<&Bound<'_, PyAny>>,
        unknown: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Pending> {
        let acquiring = self.attempt(py, name, ttl, owner, unknown)?.into_future();
        Ok(Pending::new(async move { acquiring.await.map(Answer::Lease) }))
    }

    /// For the asyncio side of this package.
    #[pyo3(name = "_inspect")]
    fn start_inspect(&self, py: Python<'_>, name: &Bound<'_, PyAny>) -> PyResult<Pending> {
        let (core, name) = (self.core(py, "inspect")?, during(values::text(name, "name"), "inspect", Some(name), py)?);
        Ok(Pending::new(async move { core.inspect(name).await.map(Answer::Record) }))
    }

    /// For the asyncio side of this package.
    #[pyo3(name = "_list")]
    fn start_list(&self, py: Python<'_>, prefix: &Bound<'_, PyAny>) -> PyResult<Pending> {
        let (core, prefix) = (self.core(py, "list")?, during(values::text(prefix, "prefix"), "list", None, py)?);
        Ok(Pending::new(async move { core.list(prefix).await.map(Answer::Records) }))
    }

    /// For the asyncio side of this package.
    #[pyo3(name = "_watch")]
    fn start_watch(&self, py: Python<'_>, name: &Bound<'_, PyAny>) -> PyResult<BaseWatch> {
        let text = during(values::text(name, "name"), "watch", Some(name), py)?;
        BaseWatch::of(py, &self.core(py, "watch")?, text)
    }

    /// For the asyncio side of this package.
    #[pyo3(name = "_break_lease")]
    fn start_break_lease(
        &self,
        py: Python<'_>,
        name: &Bound<'_, PyAny>,
        token: &Bound<'_, PyAny>,
    ) -> PyResult<Pending> {
        let arguments = values::text(name, "name").and_then(|text| Ok((text, values::token(token)?)));
        let (core, (name, token)) = (self.core(py, "break_lease")?, during(arguments, "break_lease", Some(name), py)?);
        Ok(Pending::new(async move { core.break_lease(name, token).await.map(|()| Answer::Nothing) }))
    }

    /// For the asyncio side of this package.
    #[pyo3(name = "_ping")]
    fn start_ping(&self, py: Python<'_>) -> PyResult<Pending> {
        let core = self.core(py, "ping")?;
        Ok(Pending::new(async move { core.ping().await.map(|()| Answer::Nothing) }))
    }

    /// For the asyncio side of this package.
    #[pyo3(name = "_close")]
    fn start_close(&self) -> Option<Pending> {
        let core = self.closing()?;
        Some(Pending::new(async move { core.close().await.map(|()| Answer::Nothing) }))
    }

    /// For the asyncio side of this package: a manager is entered once.
    #[pyo3(name = "_enter")]
    fn enter(&self, py: Python<'_>) -> PyResult<()> {
        if self.closed.load(Ordering::Relaxed) {
            let message = "the manager is closed, as it is at the end of its block: make a new one";
            return Err(raise(py, &Error::new(ErrorKind::Closed, message).during("enter", None)));
        }
        if self.entered.swap(true, Ordering::Relaxed) {
            let message =
                "the manager is entered already, and closed at the end of that block: use it there, or make a new one";
            return during(Err(wrong_use(py, message)), "enter", None, py);
        }
        Ok(())
    }
}

#[doc = include_str!(concat!(env!("OUT_DIR"), "/Manager"))]
#[pyclass(frozen, extends = BaseManager, module = "lease")]
pub(crate) struct Manager;

#[pymethods]
impl Manager {
    #[new]
    #[pyo3(signature = (url = None, *, ttl = None, timeout = Given(None), owner = None, request_timeout = None, **unknown),
           text_signature = "(url=None, *, ttl=None, timeout=..., owner=None, request_timeout=None)")]
    fn new(
        py: Python<'_>,
        url: Option<&Bound<'_, PyAny>>,
        ttl: Option<&Bound<'_, PyAny>>,
        timeout: Given<'_>,
        owner: Option<&Bound<'_, PyAny>>,
        request_timeout: Option<&Bound<'_, PyAny>>,
        unknown: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let base = BaseManager::new(py, url, ttl, timeout, owner, request_timeout, unknown)?;
        Ok(PyClassInitializer::from(base).add_subclass(Self))
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Manager.acquire"))]
    #[pyo3(signature = (name, *, ttl = None, timeout = Given(None), owner = None, on_wait = None, **unknown),
           text_signature = "($self, name, *, ttl=None, timeout=..., owner=None, on_wait=None)")]
    fn acquire<'py>(
        slf: &Bound<'py, Self>,
        name: &Bound<'py, PyAny>,
        ttl: Option<&Bound<'py, PyAny>>,
        timeout: Given<'py>,
        owner: Option<&Bound<'py, PyAny>>,
        on_wait: Option<Bound<'py, PyAny>>,
        unknown: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, Lease>> {
        let (py, base) = (slf.py(), slf.as_super().get());
        let mut acquire = base.acquire(py, &Asked { name, ttl, timeout, owner, unknown })?;
        if let Some(on_wait) = on_wait {
            if !on_wait.is_callable() {
                let message = format!("on_wait must be callable, not {}", values::kind(&on_wait));
                return Err(wrong_type(py, message));
            }
            let on_wait = Own::new(on_wait.unbind());
            acquire = acquire.on_wait(move |waiting| {
                attached(|py| {
                    if let Some(on_wait) = on_wait.get().map(|on_wait| on_wait.bind(py)) {
                        let told = values::waiting(py, waiting).and_then(|waiting| on_wait.call1((waiting,)));
                        unraisable(py, told, Some(on_wait));
                    }
                });
            });
        }
        Lease::of(py, BaseManager::wait(py, acquire.into_future())?)
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Manager.try_acquire"))]
    #[pyo3(signature = (name, *, ttl = None, owner = None, **unknown), text_signature = "($self, name, *, ttl=None, owner=None)")]
    fn try_acquire<'py>(
        slf: &Bound<'py, Self>,
        name: &Bound<'py, PyAny>,
        ttl: Option<&Bound<'py, PyAny>>,
        owner: Option<&Bound<'py, PyAny>>,
        unknown: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Option<Bound<'py, Lease>>> {
        let (py, base) = (slf.py(), slf.as_super().get());
        let attempt = base.attempt(py, name, ttl, owner, unknown)?;
        BaseManager::wait(py, attempt.into_future())?.map(|held| Lease::of(py, held)).transpose()
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Manager.inspect"))]
    fn inspect<'py>(slf: &Bound<'py, Self>, name: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let (py, base) = (slf.py(), slf.as_super().get());
        let (core, name) = (base.core(py, "inspect")?, during(values::text(name, "name"), "inspect", Some(name), py)?);
        BaseManager::wait(py, core.inspect(name))?.map(|record| values::record(py, record)).transpose()
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Manager.list"))]
    #[pyo3(signature = (prefix = Given(None)), text_signature = "($self, prefix='')")]
    fn list<'py>(slf: &Bound<'py, Self>, prefix: Given<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let (py, base) = (slf.py(), slf.as_super().get());
        let prefix = prefix.0.map_or_else(|| Ok(String::new()), |prefix| values::text(&prefix, "prefix"));
        let prefix = during(prefix, "list", None, py)?;
        let core = base.core(py, "list")?;
        BaseManager::wait(py, core.list(prefix))?.into_iter().map(|record| values::record(py, record)).collect()
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Manager.watch"))]
    fn watch<'py>(slf: &Bound<'py, Self>, name: &Bound<'py, PyAny>) -> PyResult<Bound<'py, Watch>> {
        Watch::of(slf.py(), slf.as_super().get().start_watch(slf.py(), name)?)
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Manager.break_lease"))]
    fn break_lease(slf: &Bound<'_, Self>, name: &Bound<'_, PyAny>, token: &Bound<'_, PyAny>) -> PyResult<()> {
        let (py, base) = (slf.py(), slf.as_super().get());
        let arguments = values::text(name, "name").and_then(|text| Ok((text, values::token(token)?)));
        let (core, (name, token)) = (base.core(py, "break_lease")?, during(arguments, "break_lease", Some(name), py)?);
        BaseManager::wait(py, core.break_lease(name, token))
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Manager.ping"))]
    fn ping(slf: &Bound<'_, Self>) -> PyResult<()> {
        let (py, base) = (slf.py(), slf.as_super().get());
        let core = base.core(py, "ping")?;
        BaseManager::wait(py, core.ping())
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Manager.close"))]
    fn close(slf: &Bound<'_, Self>) -> PyResult<()> {
        let base = slf.as_super().get();
        base.closing().map_or(Ok(()), |core| BaseManager::wait(slf.py(), core.close()))
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Manager.guard"))]
    #[pyo3(signature = (name, **options),
           text_signature = "($self, name, *, ttl=None, timeout=..., owner=None, if_busy='raise', pass_as=None)")]
    fn guard<'py>(
        slf: &Bound<'py, Self>,
        name: &Bound<'py, PyAny>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("lease._guard")?.getattr("guard")?.call((slf, false, name), options)
    }

    fn __enter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        slf.as_super().get().enter(slf.py())?;
        Ok(slf.clone())
    }

    fn __exit__(
        slf: &Bound<'_, Self>,
        _kind: &Bound<'_, PyAny>,
        _exception: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let base = slf.as_super().get();
        let Some(core) = base.closing() else { return Ok(()) };
        if let Err(error) = wait(slf.py(), core.close())? {
            // After good work, and what could not be released expires.
            tracing::warn!(%error, "not all leases could be released");
        }
        Ok(())
    }
}
