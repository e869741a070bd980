//! A store whose connection a test can cut: `lease.testing`.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use lease_core::runtime::{Environment, system};
use lease_core::store::Store;
use lease_core::stores::memory::MemoryStore;
use lease_core::testing::CutStore as Cut;
use pyo3::prelude::*;

use crate::errors::raise;
use crate::interpreter::detached;
use crate::process::Own;

#[derive(Default)]
struct Connections {
    cut: bool,
    of_managers: Vec<Weak<Cut>>,
}

#[doc = include_str!(concat!(env!("OUT_DIR"), "/CutStore"))]
#[pyclass(frozen, subclass, module = "lease.testing", name = "CutStore")]
pub(crate) struct CutStore {
    memory: Own<(Arc<MemoryStore>, Arc<dyn Environment>)>,
    connections: Mutex<Connections>,
}

impl CutStore {
    fn connections<T>(&self, of: impl FnOnce(&mut Connections) -> T) -> T {
        of(&mut self.connections.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A connection for another manager.
    pub(crate) fn connect(&self, py: Python<'_>) -> PyResult<Arc<dyn Store>> {
        let (memory, env) = self.memory.here("store").map_err(|error| raise(py, &error))?;
        let connection = Cut::new(memory.beside(env.clone()));
        self.connections(|connections| {
            if connections.cut {
                connection.cut();
            }
            connections.of_managers.retain(|other| other.strong_count() > 0);
            connections.of_managers.push(Arc::downgrade(&connection));
        });
        Ok(connection)
    }

    fn set(&self, cut: bool) {
        let connections: Vec<_> = self.connections(|connections| {
            connections.cut = cut;
            connections.of_managers.iter().filter_map(Weak::upgrade).collect()
        });
        for connection in connections {
            if cut { connection.cut() } else { connection.mend() }
        }
    }
}

#[pymethods]
impl CutStore {
    #[new]
    #[pyo3(signature = (beside = None))]
    fn new(py: Python<'_>, beside: Option<&Bound<'_, Self>>) -> PyResult<Self> {
        let env = system().map_err(|error| raise(py, &error))?;
        let memory = match beside {
            None => MemoryStore::new(env.clone()),
            Some(other) => {
                let other = other.get().memory.here("store").map_err(|error| raise(py, &error))?;
                other.0.beside(env.clone())
            }
        };
        Ok(Self { memory: Own::new((memory, env)), connections: Mutex::default() })
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/CutStore.cut"))]
    fn cut(&self, py: Python<'_>) {
        detached(py, || self.set(true));
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/CutStore.mend"))]
    fn mend(&self, py: Python<'_>) {
        detached(py, || self.set(false));
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/CutStore.is_cut"))]
    #[getter]
    fn is_cut(&self) -> bool {
        self.connections(|connections| connections.cut)
    }
}
