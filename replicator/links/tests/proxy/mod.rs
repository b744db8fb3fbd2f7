//! A TCP proxy on loopback that can be cut, stalled, taken down and pointed elsewhere.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[derive(Default)]
struct Inner {
    to: Mutex<Option<SocketAddr>>,
    live: Mutex<Vec<TcpStream>>,
    stalled: AtomicBool,
    down: AtomicBool,
}

/// One link's proxy. Its threads end with the process.
pub struct Proxy {
    /// Where to connect to.
    pub addr: SocketAddr,
    inner: Arc<Inner>,
}

impl Proxy {
    pub fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let inner = Arc::new(Inner {
            to: Mutex::new(Some(target)),
            ..Inner::default()
        });
        let for_thread = inner.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                for_thread.serve(client);
            }
        });
        Proxy { addr, inner }
    }

    /// Ends what is connected; new connections are taken.
    pub fn cut(&self) {
        for s in self.inner.live.lock().unwrap().drain(..) {
            let _ = s.shutdown(Shutdown::Both);
        }
    }

    /// Ends what is connected, and takes nothing new until [`Proxy::up`].
    pub fn down(&self) {
        self.inner.down.store(true, SeqCst);
        self.cut();
    }

    pub fn up(&self) {
        self.inner.down.store(false, SeqCst);
    }

    /// Passes nothing on, in either direction, and says nothing.
    pub fn stall(&self, stalled: bool) {
        self.inner.stalled.store(stalled, SeqCst);
    }

    pub fn point(&self, target: SocketAddr) {
        *self.inner.to.lock().unwrap() = Some(target);
        self.cut();
    }
}

impl Inner {
    fn serve(self: &Arc<Self>, client: TcpStream) {
        let target = *self.to.lock().unwrap();
        if self.down.load(SeqCst) {
            return;
        }
        let Some(Ok(server)) = target.map(TcpStream::connect) else {
            return;
        };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        for (from, to) in [(&client, &server), (&server, &client)] {
            let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
            self.live.lock().unwrap().push(from.try_clone().unwrap());
            let inner = self.clone();
            std::thread::spawn(move || {
                let mut buf = vec![0; 64 << 10];
                while let Ok(n @ 1..) = from.read(&mut buf) {
                    while inner.stalled.load(SeqCst) {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    if to.write_all(&buf[..n]).is_err() {
                        break;
                    }
                }
                let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
            });
        }
    }
}
