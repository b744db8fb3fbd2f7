//! What the links of the peer connection share: who is live, what was heard, who waits.

use super::link::Live;
use super::packet::{Heard, MAX_FRAME_BYTES, Packet};
use super::queue::Frame;
use crate::frame;
use havm_core::ids::NodeId;
use havm_core::message::Envelope;
use havm_core::spec::LinkSpec;
use serde_json::Value;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, oneshot, watch};

/// Questions of the peer that are remembered, so that one asked again is not carried out twice.
const REMEMBERED: usize = 256;
/// Longer answers are not kept for a second telling.
const MAX_KEPT_ANSWER_BYTES: usize = 1024 * 1024;

/// A question of the peer, and the way back for its answer. Where that is dropped, the asker's
/// deadline ends the wait.
pub type PeerQuestion = (Value, oneshot::Sender<Value>);

#[derive(Debug)]
pub struct Shared {
    pub node: NodeId,
    pub peer: NodeId,
    pub session: u64,
    pub port: u16,
    pub links: Vec<LinkSpec>,
    pub client_tls: Arc<rustls::ClientConfig>,
    pub server_tls: Arc<rustls::ServerConfig>,
    pub notes: mpsc::Sender<Envelope>,
    pub questions: mpsc::Sender<PeerQuestion>,
    /// Which links are live; changes tell whoever waits for one.
    pub up: watch::Sender<Vec<bool>>,
    pub next: AtomicU64,
    pub state: Mutex<State>,
}

#[derive(Debug, Default)]
pub struct State {
    live: Vec<Option<Arc<Live>>>,
    /// Why a link is not there, said once until it changes.
    failure: Vec<String>,
    heard: Heard,
    waiting: HashMap<u64, oneshot::Sender<Value>>,
    asked: VecDeque<Asked>,
}

#[derive(Debug)]
struct Asked {
    session: u64,
    id: u64,
    answer: Option<Frame>,
}

impl State {
    pub fn new(links: usize) -> Self {
        State {
            live: vec![None; links],
            failure: vec![String::new(); links],
            ..State::default()
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn link(&self, link: usize) -> io::Result<&LinkSpec> {
        self.links
            .get(link)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    pub fn link_up(&self, link: usize, live: Arc<Live>) {
        if let Some(slot) = self.lock().live.get_mut(link) {
            *slot = Some(live);
        }
        self.changed(link, true);
    }

    pub fn link_down(&self, link: usize, live: &Arc<Live>) {
        {
            let mut state = self.lock();
            match state.live.get_mut(link) {
                Some(slot) if slot.as_ref().is_some_and(|l| Arc::ptr_eq(l, live)) => *slot = None,
                _ => return,
            }
        }
        self.changed(link, false);
    }

    fn changed(&self, link: usize, up: bool) {
        if let Some(l) = self.links.get(link) {
            if let Some(f) = self.lock().failure.get_mut(link) {
                f.clear();
            }
            if up {
                tracing::info!(link = l.name, "connected to the peer's daemon");
            } else {
                tracing::warn!(link = l.name, "the connection to the peer's daemon is gone");
            }
        }
        self.up.send_modify(|all| {
            if let Some(one) = all.get_mut(link) {
                *one = up;
            }
        });
    }

    pub fn connect_failed(&self, link: usize, why: &str) {
        let mut state = self.lock();
        let Some(last) = state.failure.get_mut(link) else {
            return;
        };
        if last != why {
            *last = why.to_owned();
            let name = self.links.get(link).map_or("", |l| &l.name);
            tracing::warn!(
                link = name,
                "no connection to the peer's daemon: {why}; it is tried again"
            );
        }
    }

    /// Over every live link; `false` where there is none.
    pub fn send_note(&self, envelope: Envelope) -> bool {
        let seq = self.next.fetch_add(1, Ordering::Relaxed);
        let note = Packet::Note {
            seq,
            envelope: Box::new(envelope),
        };
        let Ok(bytes) = frame::encode(&note, MAX_FRAME_BYTES) else {
            return false;
        };
        let bytes: Frame = Arc::new(bytes);
        let state = self.lock();
        let mut sent = false;
        for live in state.live.iter().flatten() {
            live.queue.note(bytes.clone());
            sent = true;
        }
        sent
    }

    /// Over the first live link that takes it; its connection, so that its end is noticed.
    pub fn send_body(&self, bytes: &Frame) -> Option<Arc<Live>> {
        let live = self.lock().live.clone();
        live.into_iter()
            .flatten()
            .find(|l| l.queue.body(bytes.clone()))
    }

    pub fn is_live(&self, live: &Arc<Live>) -> bool {
        self.lock()
            .live
            .iter()
            .flatten()
            .any(|l| Arc::ptr_eq(l, live))
    }

    pub fn wait_for(&self, id: u64) -> oneshot::Receiver<Value> {
        let (tx, rx) = oneshot::channel();
        self.lock().waiting.insert(id, tx);
        rx
    }

    pub fn wait_no_more(&self, id: u64) {
        self.lock().waiting.remove(&id);
    }

    pub fn received(self: &Arc<Self>, session: u64, packet: Packet) {
        match packet {
            Packet::Ping | Packet::Hello { .. } => {}
            Packet::Note { seq, envelope } => {
                if envelope.from != self.peer {
                    tracing::warn!(from = ?envelope.from, "a message in another node's name is dropped");
                    return;
                }
                if self.lock().heard.is_new(session, seq) && self.notes.try_send(*envelope).is_err()
                {
                    // The engine repeats what it needs; a daemon that is that late has other worries.
                    tracing::warn!("a message of the peer is dropped: the daemon does not keep up");
                }
            }
            Packet::Answer { id, body } => {
                let waits = self.lock().waiting.remove(&id);
                if let Some(waits) = waits {
                    // Whoever asked may have given up.
                    let _ = waits.send(body);
                }
            }
            Packet::Ask { id, body } => self.asked(session, id, body),
        }
    }

    fn asked(self: &Arc<Self>, session: u64, id: u64, body: Value) {
        {
            let mut state = self.lock();
            if let Some(a) = state
                .asked
                .iter()
                .find(|a| a.session == session && a.id == id)
            {
                let answer = a.answer.clone();
                drop(state);
                if let Some(bytes) = answer {
                    self.send_body(&bytes);
                }
                return;
            }
            if state.asked.len() == REMEMBERED {
                state.asked.pop_front();
            }
            state.asked.push_back(Asked {
                session,
                id,
                answer: None,
            });
        }
        let (reply, answer) = oneshot::channel();
        if let Err(e) = self.questions.try_send((body, reply)) {
            tracing::warn!("a question of the peer is not answered: {e}");
            return;
        }
        let shared = self.clone();
        tokio::spawn(async move {
            if let Ok(body) = answer.await {
                shared.answer(session, id, body);
            }
        });
    }

    fn answer(&self, session: u64, id: u64, body: Value) {
        let bytes = match frame::encode(&Packet::Answer { id, body }, MAX_FRAME_BYTES) {
            Ok(b) => Arc::new(b),
            Err(e) => {
                tracing::warn!("an answer to the peer cannot be sent: {e}");
                return;
            }
        };
        if bytes.len() <= MAX_KEPT_ANSWER_BYTES {
            let mut state = self.lock();
            let asked = state
                .asked
                .iter_mut()
                .find(|a| a.session == session && a.id == id);
            if let Some(a) = asked {
                a.answer = Some(bytes.clone());
            }
        }
        // With no link, the asker asks again when there is one.
        self.send_body(&bytes);
    }
}
